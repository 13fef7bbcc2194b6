"""The training of a BPE: its time, its progress and its end, and the same vocabulary as the plain trainer's."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt_kit_hf.errors import RunError
from gpt_kit_hf.tokenization import bpe_training
from gpt_kit_hf.tokenization.bpe_training import LEARNED_PATTERN
from gpt_kit_hf.tokenization.encodings import train_bpe
from gpt_kit_hf.tokenization.export import GPT2_PATTERN, byte_characters, byte_level_split

PIECES = [
    "a",
    "Zz",
    "é",
    "北京",
    "मस्",
    "7",
    "12345",
    "'ll",
    "'",
    "_=",
    "👍🏽",
    " ",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
]


def random_text(seed: int, longest: int) -> str:
    """Pieces in runs of at most `longest` characters of the same one."""
    rng = random.Random(seed)
    return "".join((piece := rng.choice(PIECES)) * (rng.randint(1, longest) // len(piece)) for _ in range(60))


def plainly_trained(texts: list[str], size: int) -> dict[bytes, int]:
    """The ranks of a vocabulary that the trainer of `tokenizers` learns by the pattern itself."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = byte_level_split(GPT2_PATTERN)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = learner.get_vocab()
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in sorted(learned, key=lambda token: learned[token]):
        ranks.setdefault(bytes(byte_of[character] for character in token), len(ranks))
    return ranks


def test_the_pattern_of_the_trainer_splits_as_that_of_the_vocabulary() -> None:
    plain, bounded = byte_level_split(GPT2_PATTERN), byte_level_split(LEARNED_PATTERN)
    lengths: set[int] = set()
    for seed in range(300):
        text = random_text(seed, longest=20 if seed % 2 else 60)
        expected = plain.pre_tokenize_str(text)
        lengths |= {end - start for _, (start, end) in expected}
        if max(end - start for _, (start, end) in expected) <= 256:
            assert bounded.pre_tokenize_str(text) == expected
    assert max(lengths) > 100
    for kind in ("a", " ", "\n", "=", "é", "\n "):
        for length in (1, 2, 255, 256, 257, 258, 1000):
            for after in ("", "x", " x", "\n", "5"):
                text = (kind * length)[:length] + after
                pieces = [text[start:end] for _, (start, end) in bounded.pre_tokenize_str(text)]
                assert "".join(pieces) == text
                assert max(map(len, pieces)) <= 257  # a space before a word counts besides
                if length < 256:
                    assert bounded.pre_tokenize_str(text) == plain.pre_tokenize_str(text)


def test_the_vocabulary_is_that_of_the_plain_trainer() -> None:
    texts = [Path(module).read_text(encoding="utf-8") for module in (random.__file__, subprocess.__file__)]
    texts += [random_text(seed, longest=12) for seed in range(20)]
    assert train_bpe(texts, 1500)._mergeable_ranks == plainly_trained(texts, 1499)


@pytest.mark.parametrize("kind", ["letters", "one letter", "blanks", "signs"])
def test_a_long_run_without_a_blank_takes_seconds(kind: str) -> None:
    rng, size = random.Random(0), 1_200_000
    runs = {"letters": "abcdefghijklmnop", "one letter": "a", "blanks": " \n", "signs": "=-_+"}
    text = "".join(rng.choices(runs[kind], k=size)) + "x"
    began = time.perf_counter()
    encoding = train_bpe([text], 600)
    assert time.perf_counter() - began < 30  # the plain trainer takes more than 10 minutes
    assert encoding.decode(encoding.encode_ordinary(text[:1000])) == text[:1000]
    assert max(map(len, encoding._mergeable_ranks)) <= 257


def test_the_working_directory_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tokenizers", "json", "tiktoken"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    assert train_bpe(["abab"], 300).n_vocab == 258


def test_a_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bpe_training, "__name__", "signal; signal.raise_signal(signal.SIGKILL)  #")
    with pytest.raises(RunError, match=r"ended with exit code .*lower --vocab_text_mb"):
        train_bpe(["abab " * 1_000_000], 300)


def test_an_error_while_texts_are_read_ends_the_process() -> None:
    class OddError(Exception):
        pass

    def texts() -> Iterator[str]:
        yield "abab" * 100_000
        raise OddError

    with pytest.raises(OddError):
        train_bpe(texts(), 300)
    assert [child for child in psutil.Process().children() if "bpe_training" in " ".join(child.cmdline())] == []


# --- the command


def train_command(tmp_path: Path) -> list[str]:
    """A command that would train a vocabulary for a long time: most words occur once."""
    rng = random.Random(0)
    words = (f"{rng.choice('abcdefgh')}{rng.getrandbits(350):x}" for _ in range(200_000))
    (tmp_path / "text.txt").write_text(" ".join(words))
    options = [f"--text_files={tmp_path}/text.txt", f"--output_dir={tmp_path}/run", "--vocab_size=60000", "--use_cpu"]
    return [sys.executable, "-m", "gpt_kit_hf.commands.main", "train", "--model=nano-xs", *options]


@pytest.mark.parametrize(
    ("number", "line", "code"),
    [
        (signal.SIGTERM, "error: stopped by SIGTERM before the first step\n", 75),
        pytest.param(signal.SIGINT, "error: interrupted\n", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_training_of_a_vocabulary(
    number: signal.Signals, line: str, code: int, tmp_path: Path
) -> None:
    def heard() -> None:  # a shell starts what is in its background with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = train_command(tmp_path)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, text=True, preexec_fn=heard, env=environment, **streams) as process, ended(process):
        assert process.stdout is not None
        assert process.stdout.readline() == "loading  PyTorch and transformers\n"
        assert process.stdout.readline().startswith("reading  ")
        assert process.stdout.readline() == "training a bpe of 60,000 tokens on the text\n"
        [child] = wait_for_children(process.pid)
        while child.cpu_times().user < 1:  # beyond the imports, in the trainer
            time.sleep(0.05)
        began = time.perf_counter()
        process.send_signal(number)
        assert process.stderr is not None
        assert line in process.stderr  # read until there
        assert time.perf_counter() - began < 2  # the interpreter ends torch after that
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == code
    assert not child.is_running()
    assert not (tmp_path / "run").exists()


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill a process if the test fails: leaving it would wait for its end."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def wait_for_children(pid: int) -> list[psutil.Process]:
    for _ in range(1000):
        if children := psutil.Process(pid).children():
            return children
        time.sleep(0.02)
    raise AssertionError("no process that trains the vocabulary")


def test_a_terminal_shows_the_progress() -> None:
    main, terminal = pty.openpty()
    program = "from gpt_kit_hf import train_bpe; print(train_bpe(['a few words, a few words'] * 9999, 300).n_vocab)"
    shown = b""
    with subprocess.Popen([sys.executable, "-c", program], stderr=terminal, stdout=subprocess.PIPE) as process:
        os.close(terminal)
        with suppress(OSError):  # the end of a terminal
            while data := os.read(main, 1 << 16):
                shown += data
        os.close(main)
        assert process.stdout is not None
        assert process.stdout.read().strip().isdigit()
    assert b"Compute merges" in shown


def test_encodings_of_both_trainers_encode_alike() -> None:
    texts = [random_text(seed, longest=9) for seed in range(30)]
    ranks = plainly_trained(texts, 400)
    plain = tiktoken.Encoding(
        "plain", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    trained = train_bpe(texts, 401)
    for seed in range(50):
        text = random_text(seed, longest=300)
        assert trained.encode_ordinary(text) == plain.encode_ordinary(text)
