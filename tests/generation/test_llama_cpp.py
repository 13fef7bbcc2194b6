"""GGUF files run by llama.cpp: as the model that they were written from, in the commands and as an engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import gpt_kit
from test_server import started
from tiny_model import CHAT_TEMPLATE, CONTEXT, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import get_encoding, save_as_gguf, text_to_token_ids
from gpt_kit_hf.commands import engines
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.generation.completion import Chunk, Sampling
from gpt_kit_hf.generation.completion_model import CompletionModel

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'gpt-kit-hf[llama]'")

from gguf_models import write_tiny_gguf

from gpt_kit_hf.generation.llama_cpp import server as llama_server
from gpt_kit_hf.generation.llama_cpp.compare import compare_with_llama_cpp
from gpt_kit_hf.generation.llama_cpp.model import LlamaCppModel

PROMPT = list(b"fox")
# llama.cpp looks GELU up in a table of 16-bit numbers.
CLOSE = 5e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder, chat_template=CHAT_TEMPLATE)
    write_tiny_gguf(folder, folder / "tiny.gguf", chat_template=CHAT_TEMPLATE)
    write_tiny_gguf(folder, folder / "plain.gguf")
    return folder


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def engine(file: Path) -> LlamaCppModel:
    return LlamaCppModel(file, slots=2, threads=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def logprobs_after(model: Any, ids: list[int]) -> torch.Tensor:
    """(T, V): the log-probabilities after each token, by a plain forward pass."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def greedy(model: Any, prompt: list[int], n_new: int, **how: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False, **how)
    return list(out[0, len(prompt) :].tolist())


def completed(engine: Any, prompt: list[int] = PROMPT, n: int = 1, **sampling: Any) -> list[Chunk]:
    chunks: list[Chunk] = []
    engine.complete(prompt, n, Sampling(**{"max_new_tokens": 24, "temperature": 0, **sampling}), chunks.append)
    return chunks


def text_of(chunks: list[Chunk], choice: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.choice == choice)


# --- the engine


def test_greedy_tokens_are_those_of_the_model(engine: LlamaCppModel, model: Any) -> None:
    room = CONTEXT - len(PROMPT)
    expected = greedy(model, PROMPT, room)
    assert len(set(expected)) > 2
    assert engine.greedy(PROMPT, room) == expected
    chunks = completed(engine, max_new_tokens=room)
    assert text_of(chunks) == bytes(token for token in expected if token != 256).decode()
    assert sum(chunk.n_tokens for chunk in chunks) == len(expected)
    assert sum(bool(chunk.text) for chunk in chunks) > room // 2  # it is a stream
    assert chunks[-1].finish_reason == "length"


def test_an_answer_is_the_same_after_other_answers(engine: LlamaCppModel) -> None:
    first = text_of(completed(engine, top_logprobs=1))
    completed(engine, list(b"fo"), max_new_tokens=9)
    completed(engine, list(b"foxy dog"), max_new_tokens=9)
    assert text_of(completed(engine)) == text_of(completed(engine, top_logprobs=1)) == first


def test_log_probabilities_are_those_of_the_model(engine: LlamaCppModel, model: Any) -> None:
    tokens = [token for chunk in completed(engine, top_logprobs=3) for token in chunk.tokens]
    ids = PROMPT + [token.spelling[0] for token in tokens]
    expected = logprobs_after(model, ids)
    for place, token in enumerate(tokens, start=len(PROMPT)):
        best = expected[place - 1].topk(3)
        assert token.offset == place - len(PROMPT)
        assert token.logprob == pytest.approx(float(expected[place - 1, ids[place]]), abs=CLOSE)
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=CLOSE)
    scored = engine.score(ids, 2)
    assert (scored[0].logprob, scored[0].top) == (None, [])
    values = [float(expected[place - 1, ids[place]]) for place in range(1, len(ids))]
    assert [token.logprob for token in scored[1:]] == pytest.approx(values, abs=CLOSE)


def test_tokens_inside_of_a_character_are_reported_and_counted(engine: LlamaCppModel, model: Any) -> None:
    # Biases that leave the bytes of one character, and in no order: some make the character, some do not.
    character = "é".encode()
    sampling = {"logit_bias": dict.fromkeys(character, 1e3), "temperature": 2.0, "seed": 3, "max_new_tokens": 40}
    chunks = completed(engine, **sampling, top_logprobs=1)
    tokens = [token for chunk in chunks for token in chunk.tokens]
    ids = [token.spelling[0] for token in tokens]
    assert len(ids) == 40
    assert set(ids) == set(character)
    assert text_of(chunks) == bytes(ids).decode(errors="replace")
    assert {"é", "\ufffd"} <= set(text_of(chunks))
    expected = logprobs_after(model, PROMPT + ids)
    for place, token in enumerate(tokens):
        wanted = float(expected[len(PROMPT) + place - 1, ids[place]])
        assert token.logprob == pytest.approx(wanted, abs=CLOSE)
    del sampling["seed"]
    streamed = completed(engine, **sampling)
    assert sum(chunk.n_tokens for chunk in streamed) == 40
    assert set(text_of(streamed)) <= {"é", "\ufffd"}


def test_samples_follow_the_distribution_of_the_model(engine: LlamaCppModel, model: Any) -> None:
    n = 2000
    chunks = completed(engine, n=n, max_new_tokens=1, temperature=1.3, top_k=12, top_p=0.9)
    scores = logprobs_after(model, PROMPT)[-1] / 1.3
    best = scores.topk(12)
    kept = best.values.softmax(dim=-1)
    kept = kept.where(kept.cumsum(dim=-1) - kept < 0.9, torch.tensor(0.0))
    wanted = dict(zip(best.indices.tolist(), (kept / kept.sum()).tolist(), strict=True))
    found = [chunk.text for chunk in chunks if chunk.text]
    assert len(found) == n
    assert {ord(each) for each in found} <= {token for token, share in wanted.items() if share}
    for token, share in wanted.items():  # within five standard deviations
        assert found.count(chr(token)) / n == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5 + 1e-9)


def test_a_seed_repeats_a_sample_with_and_without_what_is_reported(engine: LlamaCppModel) -> None:
    how = {"temperature": 1.5, "seed": 2**62}
    two = completed(engine, n=2, **how)
    assert text_of(two, 0) == text_of(completed(engine, **how))
    assert text_of(two, 1) == text_of(completed(engine, temperature=1.5, seed=2**62 + 1, top_logprobs=2))
    assert len({text_of(two, 0), text_of(two, 1), text_of(completed(engine, temperature=1.5))}) == 3


def test_penalties_biases_and_stop_strings_are_those_of_the_model_in_torch(
    engine: LlamaCppModel, folder: Path
) -> None:
    torch_engine = CompletionModel(
        AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    )
    text = text_of(completed(torch_engine))
    for how in (
        {"frequency_penalty": 1.5, "presence_penalty": 0.7},
        {"logit_bias": {ord(text[3]): -100.0, ord("z"): 3.0}},
        {"stop": [text[4:7], "never"]},
        {"stop": [text[4]], "top_logprobs": 0},
        {"max_new_tokens": 0},
        {"logit_bias": {256: 1e3}},
        {"logit_bias": {256: 1e3}, "top_logprobs": 1},
    ):
        own, expected = completed(engine, **how), completed(torch_engine, **how)
        assert text_of(own) == text_of(expected), how
        assert own[-1].finish_reason == expected[-1].finish_reason, how
        assert sum(len(chunk.tokens) for chunk in own) == sum(len(chunk.tokens) for chunk in expected), how
        # A stop string ends a stream with the token that completes it, or with the next: it arrives in parts.
        assert sum(chunk.n_tokens for chunk in own) == sum(chunk.n_tokens for chunk in expected), how


@pytest.mark.parametrize("seed", [None, 1])
def test_a_cancelled_completion_ends_before_its_next_token(engine: LlamaCppModel, seed: int | None) -> None:
    chunks: list[Chunk] = []
    sampling = Sampling(max_new_tokens=50, logit_bias={ord("a"): 1e4}, seed=seed)
    engine.complete(PROMPT, 20, sampling, chunks.append, is_cancelled=lambda: len(chunks) >= 3)
    assert len(chunks) == 3
    assert text_of(completed(engine, max_new_tokens=5))  # its slot is free again


def test_its_tokenizer_is_that_of_the_file(engine: LlamaCppModel, folder: Path) -> None:
    text = "fox é 日本 😀\n<|endoftext|>  x"
    ids = text_to_token_ids(text, get_encoding("bytes"))[0].tolist()
    assert engine.tokenizer.encode(text) == engine.tokenizer.encode(text, add_special_tokens=False) == ids
    assert 256 in ids
    assert engine.decode(ids) == text
    assert engine.tokenizer.all_special_tokens == ["<|endoftext|>"]
    theirs, turns = AutoTokenizer.from_pretrained(folder), [{"role": "user", "content": "hi"}]
    rendered = engine.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_a_file_is_compared_with_its_model(file: Path, folder: Path, model: Any) -> None:
    found = compare_with_llama_cpp(model, get_encoding("bytes"), file, threads=1)
    assert (found.n_same_texts, found.n_same_tokens) == (found.n_texts, found.n_tokens)
    assert found.n_tokens == CONTEXT - 1
    assert abs(found.divergence) < 1e-5
    assert found.line() == (
        f"llama.cpp: the same ids for {found.n_texts} of {found.n_texts} texts, the same greedy tokens for the first "
        f"63 of 63, KL divergence {found.divergence:.2g} nats a token, the mean of 8"
    )
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.roll(1, dims=0))
    worse = compare_with_llama_cpp(other, AutoTokenizer.from_pretrained(folder), file, threads=1)
    assert worse.n_same_texts == worse.n_texts
    assert worse.n_same_tokens == 0
    assert worse.divergence > 0.1
    with pytest.raises(CheckpointError, match=r"llama\.cpp computes another model: KL divergence"):
        worse.require()


def test_the_comparison_does_not_end_with_the_text(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[256] = 3 * model.lm_head.weight[97]
    save_as_gguf(model, get_encoding("bytes"), tmp_path / "model.gguf", quantization="f32")
    assert LlamaCppModel(tmp_path / "model.gguf", threads=1).greedy([256], 63)[-1] == 256
    found = compare_with_llama_cpp(model, get_encoding("bytes"), tmp_path / "model.gguf", threads=1)
    assert (found.n_tokens, found.n_same_tokens, found.n_positions) == (63, 63, 8)


# --- the commands


def test_generate_says_what_the_model_says(file: Path, folder: Path) -> None:
    how = ("--prompt", "fox", "--temperature", "0", "--max_new_tokens", "30")
    expected = gpt_kit("generate", folder, *how)
    assert gpt_kit("generate", file, *how) == expected
    assert expected.exit_code == 0
    assert gpt_kit("generate", file, "--temperature", "0") == gpt_kit("generate", folder, "--temperature", "0")
    sampled = [gpt_kit("generate", file, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_needs_no_torch_and_writes_nothing_else(file: Path) -> None:
    code = (
        "import sys; from gpt_kit_hf.commands.main import main; "
        f"assert main(['generate', {str(file)!r}, '--prompt', 'fox', '--temperature', '0']) == 0; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == gpt_kit("generate", file, "--prompt", "fox", "--temperature", "0").stdout


@pytest.mark.slow
def test_generate_of_a_folder_shows_no_progress_bar(folder: Path) -> None:
    line = [sys.executable, "-m", "gpt_kit_hf.commands.main", "generate", str(folder), "--engine", "llama.cpp"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr


def test_chat_says_what_the_model_says(file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for place in (file, folder, folder / "plain.gguf"):
        lines = iter(["hello", "and more", "/clear", "x" * CONTEXT, "again"])
        monkeypatch.setattr("gpt_kit_hf.commands.generate._read_lines", lambda lines=lines: lines)
        said.append(gpt_kit("chat", place, "--temperature", "0", "--max_new_tokens", "12"))
    assert said[0].stdout == said[1].stdout
    assert said[0].stderr.splitlines()[1:] == said[1].stderr.splitlines()[1:]
    assert "tokens, and the model's context 64: none is left" in said[0].stderr
    assert "no chat template: it continues your text" in said[2].stderr


def test_an_interrupt_ends_it_in_the_middle(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "long", context=30_000)
    write_tiny_gguf(tmp_path / "long", tmp_path / "long.gguf")
    arguments = ["generate", str(tmp_path / "long.gguf"), "--prompt", "fox", "--max_new_tokens", "29000"]
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", *arguments]
    # A shell's background jobs ignore SIGINT, and so do the processes that they start.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(20).startswith(b"fox")
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - begun < 30
    assert (process.returncode, errors.decode()) == (130, "error: interrupted\n")


def test_sigterm_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "long", context=30_000)
    (tmp_path / "temporary").mkdir()
    arguments = ["generate", str(tmp_path / "long"), "--engine", "llama.cpp", "--max_new_tokens", "29000"]
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", *arguments, "--prompt", "fox"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(20).startswith(b"fox")
            assert list((tmp_path / "temporary").glob("*/model.gguf"))
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.endswith(b"error: interrupted\n")
    assert not list((tmp_path / "temporary").glob("*/model.gguf"))


REFUSED = {
    ("generate", "FILE", "--overflow", "slide"): "overflow=slide: llama.cpp does not continue a text beyond",
    ("generate", "FILE", "--dtype", "int8"): "dtype=int8: the weights of a GGUF file have the precision that it was",
    ("chat", "FILE", "--dtype", "float16"): "dtype=float16: the weights of a GGUF file",
    ("chat", "FILE", "--device", "cuda"): "device=cuda: llama.cpp runs on the CPU here; leave --device out",
    ("generate", "FILE", "--engine", "torch"): "is a GGUF file, which only llama.cpp runs: leave --engine out",
    ("serve", "FILE", "--engine", "torch"): "is a GGUF file, which only llama.cpp runs: leave --engine out",
    ("evaluate", "FILE", "--data", "python-stdlib"): "is a GGUF file, which only generate, chat and serve run",
    ("generate", "BROKEN"): "is not complete: it has 20,000 bytes",
    ("chat", "OTHER"): "is no GGUF file: it begins with b'text'",
    ("serve", "OTHER"): "is no GGUF file: it begins with b'text'",
    ("serve", "none.gguf"): "'none.gguf': no such file",
    ("generate", "FILE", "--engine", "llama"): "unknown engine 'llama'; did you mean 'llama.cpp'?",
}


@pytest.mark.parametrize("line", REFUSED, ids=" ".join)
def test_what_llama_cpp_cannot_do_is_refused_before_it_starts(
    line: tuple[str, ...], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.gguf").write_bytes(file.read_bytes()[:20_000])
    (tmp_path / "other.gguf").write_text("text")
    names = {"FILE": file, "FOLDER": file.parent, "BROKEN": tmp_path / "broken.gguf", "OTHER": tmp_path / "other.gguf"}
    monkeypatch.setattr(llama_server, "LlamaServer", None)  # or it would be started
    ended = gpt_kit(*(names.get(part, part) for part in line))
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert REFUSED[line] in ended.stderr


def test_a_file_that_llama_cpp_does_not_know_is_refused(file: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(file.read_bytes().replace(b"gpt2", b"gpt9"))
    with pytest.raises(UsageError, match="its architecture or tokenizer is unknown to xllamacpp"):
        LlamaCppModel(unknown)
    ended = gpt_kit("generate", unknown)
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)


def test_without_the_extra_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_server, "find_spec", lambda _: None)
    for command in ("generate", "chat", "serve"):
        ended = gpt_kit(command, file)
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert 'pip install "gpt-kit-hf[llama]"' in ended.stderr


def test_a_text_beyond_the_context_is_refused(file: Path) -> None:
    ended = gpt_kit("generate", file, "--max_new_tokens", CONTEXT)
    assert ended.exit_code == 2
    assert ended.stderr.endswith("max_position_embeddings=64: lower --max_new_tokens\n")
    assert main(["generate", str(file), "--max_new_tokens", str(CONTEXT - 1)]) == 0


def test_signals_stay_with_python(file: Path) -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        engine = LlamaCppModel(file, threads=1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert engine.greedy(PROMPT, 2)
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_options_decide_the_engine(file: Path, folder: Path) -> None:
    from gpt_kit_hf.options.generation import GenerateOptions

    def uses(place: Path, engine: Any) -> bool:
        return engines.uses_llama_cpp(GenerateOptions(model_name_or_path=str(place), engine=engine))

    assert [uses(file, "auto"), uses(folder, "auto"), uses(folder, "llama.cpp")] == [True, False, True]


def test_serve_answers_until_interrupted(folder: Path, model: Any) -> None:
    with started(folder / "plain.gguf") as (process, client, lines):
        assert "chat requests are refused" in lines[1]
        name = client.models.list().data[0].id
        completion = client.completions.create(model=name, prompt="fox", max_tokens=8, temperature=0)
        assert completion.choices[0].text == bytes(greedy(model, PROMPT, 8)).decode()
        stream = client.completions.create(model=name, prompt="fox", max_tokens=60, stream=True)
        assert next(iter(stream)).choices[0].text
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_llama_cpp_runs_a_folder_when_asked(dtype: str, folder: Path) -> None:
    line = ("generate", folder, "--prompt", "to be", "--max_new_tokens", "30", "--temperature", "0")
    ended = gpt_kit(*line, "--engine", "llama.cpp", "--dtype", dtype)
    assert (ended.exit_code, ended.stdout) == (0, gpt_kit(*line).stdout)
