"""Conversations: what the model is given, what is dropped, and how a terminal or a pipe ends them."""

from __future__ import annotations

import io
import os
import pty
import random
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import CHAT_TEMPLATE, CONTEXT, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf.commands import generate as generate_commands
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation import generate as generate_module
from gpt_kit_hf.generation.chat import Conversation, MessageTooLongError, converse
from gpt_kit_hf.options.generation import ChatOptions

GREEDY = ChatOptions(max_new_tokens=12, temperature=0.0, top_k=None)
SETTINGS = ["--max_new_tokens=12", "--temperature=0", "--top_k=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The texts that the model would be given, with the number of tokens to add; it answers in eight dots."""
    asked: list[tuple[str, int]] = []

    def answer(_model: Any, _tokenizer: Any, prompt: str, *, max_new_tokens: int, **_: Any) -> str:
        asked.append((prompt, max_new_tokens))
        return "." * 8

    monkeypatch.setattr(generate_module, "stream_text", answer)
    return asked


def answers_to(conversation: Conversation, *texts: str) -> list[str]:
    return [conversation.answer(text, lambda _: None, lambda _: None) for text in texts]


def continued(model: Any, tokenizer: Any, text: str) -> str:
    ids = torch.tensor([list(text.encode())])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :]))


def test_a_model_without_a_template_continues_what_stands_on_the_screen(model: Any, tokenizer: Any) -> None:
    first, second = answers_to(Conversation(model, tokenizer, GREEDY), "the quick", "brown")
    assert first == continued(model, tokenizer, "the quick")
    assert second == continued(model, tokenizer, f"the quick{first}\nbrown")
    # The oracle can tell: without the history the model says something else.
    assert second != continued(model, tokenizer, "brown")


def test_a_model_with_a_template_is_given_what_the_template_writes(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    first, second = answers_to(Conversation(model, tokenizer, GREEDY), "fox", "dog")
    assert first == continued(model, tokenizer, "[u]fox[a]")
    assert second == continued(model, tokenizer, f"[u]fox[a]{first}[u]dog[a]")


def test_the_answer_streams(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    answer = Conversation(model, tokenizer, GREEDY).answer("the quick", pieces.append, lambda _: None)
    assert len(pieces) > 1
    assert "".join(pieces) == answer


def test_the_oldest_turns_are_dropped_and_no_more_than_must_be(
    model: Any, tokenizer: Any, prompts: list[tuple[str, int]]
) -> None:
    chance = random.Random(0)
    dropped = 0
    for _ in range(60):
        wanted = chance.choice([1, 10, 30, 500])
        conversation = Conversation(model, tokenizer, ChatOptions(max_new_tokens=wanted))
        texts = ["x" * chance.randint(1, CONTEXT - 1) for _ in range(6)]
        answers_to(conversation, *texts)
        start = 0  # of the turns that are still there
        for turn, text in enumerate(texts):
            prompt, n_new = prompts[-6:][turn]

            def written(first: int, turn: int = turn, text: str = text, texts: list[str] = texts) -> str:
                return "\n".join([*(f"{earlier}{'.' * 8}" for earlier in texts[first:turn]), text])

            enough = min(wanted, CONTEXT // 2)
            fitting = [first for first in range(start, turn) if CONTEXT - len(written(first)) >= enough]
            dropped += (min(fitting) if fitting else turn) - start
            start = min(fitting) if fitting else turn
            assert prompt == written(start)
            assert n_new == min(wanted, CONTEXT - len(prompt))
            assert n_new >= 1
    assert dropped > 60


def test_dropped_turns_are_reported(model: Any, tokenizer: Any, prompts: list[tuple[str, int]]) -> None:
    notes: list[str] = []
    conversation = Conversation(model, tokenizer, ChatOptions(max_new_tokens=8))
    for text in ("a" * 10, "b" * 10, "c" * 50, "d"):
        conversation.answer(text, lambda _: None, notes.append)
    assert notes == [
        "(the oldest 2 turns no longer fit in the context of 64 tokens)",
        "(the oldest turn no longer fits in the context of 64 tokens)",
    ]
    assert [prompt for prompt, _ in prompts][-2:] == ["c" * 50, "d"]


def test_a_message_that_fills_the_context_is_refused_and_the_conversation_goes_on(
    model: Any, tokenizer: Any, prompts: list[tuple[str, int]]
) -> None:
    conversation = Conversation(model, tokenizer, GREEDY)
    answers_to(conversation, "one")
    with pytest.raises(MessageTooLongError, match=r"the message has 64 tokens, and the model's context 64"):
        answers_to(conversation, "x" * CONTEXT)
    notes: list[str] = []
    converse(conversation, ["y" * 70, "two"], lambda _: None, notes.append)
    assert notes == ["error: the message has 70 tokens, and the model's context 64: none is left to answer"]
    assert prompts[-1][0] == "one........\ntwo"


def test_commands_and_blank_lines(model: Any, tokenizer: Any, prompts: list[tuple[str, int]]) -> None:
    notes: list[str] = []
    conversation = Conversation(model, tokenizer, GREEDY)
    lines = ["one", "", "  ", "/clera", "/usr/bin is", " two", "/clear", "three", " /exit ", "four"]
    converse(conversation, lines, lambda _: None, notes.append)
    assert [prompt for prompt, _ in prompts] == [
        "one",
        "one........\n/usr/bin is",
        "one........\n/usr/bin is........\n two",
        "three",
    ]
    assert notes == ["unknown command '/clera'; did you mean '/clear'?", "(forgotten)"]


def test_an_error_of_the_chat_template_is_one_line(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="the chat template cannot write the conversation: roles must alternate"):
        answers_to(Conversation(model, tokenizer, GREEDY), "hello")


def test_options_are_checked(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1, got 0"):
        ChatOptions(max_new_tokens=0)
    # As in transformers, more tokens than there are is all of them.
    sampled = []
    for top_k in (None, 257, 1000):
        torch.manual_seed(0)
        sampled.append(answers_to(Conversation(model, tokenizer, ChatOptions(top_k=top_k, temperature=2.0)), "hello"))
    assert sampled[0] == sampled[1] == sampled[2]


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_piped_lines_are_answered_and_nothing_else_is_on_the_output(
    folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, b"the quick\r\n\nlazy")
    assert main(["chat", str(folder), *SETTINGS]) == 0
    first = continued(model, tokenizer, "the quick")
    out, err = capsys.readouterr()
    assert out == f"{first}\n{continued(model, tokenizer, f'the quick{first}' + chr(10) + 'lazy')}\n"
    assert "no chat template: it continues your text" in err
    assert err.count("\n") == 1


def test_invalid_utf8_does_not_end_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, b"the \xff quick\nfox\n")
    assert main(["chat", str(folder), *SETTINGS]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_a_seed_makes_a_conversation_repeatable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(seed: int) -> str:
        pipe(monkeypatch, b"the quick\nfox\n")
        assert main(["chat", str(folder), *SETTINGS, "--temperature=1.5", f"--seed={seed}"]) == 0
        return capsys.readouterr().out

    assert talk(1) == talk(1) != talk(2)


def test_a_folder_without_a_model_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path), *SETTINGS]) == 2
    err = capsys.readouterr().err
    assert "holds no model" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "device 'cuda:99' cannot be used: "), ("gpu", "unknown device 'gpu'")]
)
def test_a_missing_device_is_a_one_line_error(
    device: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(folder), *SETTINGS, f"--device={device}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


class Terminal:
    """A child process on a terminal of its own; the model in it says what it is told to, without computing."""

    def __init__(self, body: Callable[[], int]) -> None:
        with warnings.catch_warnings():
            # Newer Pythons warn that torch's threads do not survive a fork; the child uses none.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid, self.screen = pty.fork()
        if self.pid == 0:
            code = 99
            # A suite that runs in the background inherits an interrupt key that is ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
                code = body()
            finally:
                os._exit(code)

    def read_until(self, text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            more = os.read(self.screen, 1024)  # where the child has ended: an OSError on Linux, b"" elsewhere
            assert more, seen
            seen += more
        return seen

    def type(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def end_by(self, keys: bytes) -> int:
        """Type the keys, and again as a person would: `input` misses a Ctrl-C in the instant before it waits."""
        try:
            for _ in range(20):
                self.type(keys)
                while select.select([self.screen], [], [], 2.0)[0]:
                    if not os.read(self.screen, 1024):
                        raise EOFError
            os.kill(self.pid, signal.SIGKILL)
        except (OSError, EOFError):
            pass
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("ending", ["ctrl-d", "ctrl-c", "ctrl-c in an answer", "/exit"])
def test_a_terminal_ends_it_with_success(
    ending: str, folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_model: Any, _tokenizer: Any, prompt: str, *, on_text: Callable[[str], None], **_: Any) -> str:
        on_text("\x1b[2J said")
        while prompt.endswith("wait"):
            time.sleep(0.01)
        return " said"

    monkeypatch.setattr(generate_module, "stream_text", answer)
    monkeypatch.setattr(generate_commands, "_load", lambda *_: (model, tokenizer))
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal(lambda: main(["chat", str(folder), *SETTINGS]))
    terminal.read_until(b"> ")
    terminal.type(b"hello\n")
    seen = terminal.read_until(b"said\r\n> ")
    assert b"\x1b[2J" not in seen  # a model cannot steer the terminal
    if ending == "ctrl-c in an answer":
        terminal.type(b"wait\n")
        terminal.read_until(b"said")
    assert terminal.end_by({"ctrl-d": b"\x04", "/exit": b"/exit\n"}.get(ending, b"\x03")) == 0
