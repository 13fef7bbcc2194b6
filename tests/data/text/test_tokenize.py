"""Tokenizing before training: shares are disjoint and the whole, and a run then tokenizes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.text import shards
from gpt_kit_hf.data.text.corpus import prepare_corpus
from gpt_kit_hf.data.text.tokenize import tokenize_text
from gpt_kit_hf.data.text.tokens import token_cache
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.options.run import ShareOptions
from gpt_kit_hf.tokenization.encodings import get_encoding

ENCODING = get_encoding("bytes")


@pytest.fixture(autouse=True)
def _small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(shards, "SHARD_BYTES", 600)
    monkeypatch.setattr("gpt_kit_hf.data.text.sources.SHARD_BYTES", 600)


@pytest.fixture
def text(tmp_path: Path) -> TextOptions:
    rng = np.random.default_rng(0)
    for index in range(12):
        words = rng.integers(97, 123, size=(int(rng.integers(20, 200)), 5)).astype(np.uint8)
        (tmp_path / f"{index:02}.txt").write_text(" ".join(bytes(word).decode() for word in words))
    (tmp_path / "held-out.text").write_text("a few words that no other file has " * 4)
    held_out = [str(tmp_path / "held-out.text")]
    return TextOptions(
        text_files=[f"{tmp_path}/*.txt"], eval_files=held_out, token_cache_dir=str(tmp_path / "shared" / "tokens")
    )


def test_shares_are_the_whole_and_a_run_tokenizes_nothing(
    text: TextOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = prepare_corpus(TextOptions(**{**vars(text), "token_cache_dir": None}), ENCODING, seed=1)
    made = [tokenize_text(text, ENCODING, ShareOptions(num_shards=3, shard_index=index)) for index in range(3)]
    assert [each.made for each in made] == [each.shards for each in made]
    assert sum(each.shards for each in made) == made[0].shards_of_all > 12
    assert sum(each.documents for each in made) == alone.documents + 1
    assert sum(each.tokens for each in made) == len(alone.text) + len(alone.eval)
    assert sum(each.size for each in made) == sum(file.stat().st_size for file in tmp_path.glob("*.t*xt"))
    again = tokenize_text(text, ENCODING)
    assert (again.made, again.made_tokens, again.shards) == (0, 0, again.shards_of_all)
    monkeypatch.setattr(token_cache, "_encode_shard", None)
    corpus = prepare_corpus(text, ENCODING, seed=1)
    assert corpus.fingerprint == alone.fingerprint
    np.testing.assert_array_equal(corpus.train.read(0, len(corpus.train)), alone.train.read(0, len(alone.train)))


def test_an_interrupted_share_goes_on_where_it_stopped(text: TextOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, done = token_cache._encode_shard, []

    def stopped(*given: object) -> object:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(given)
        return encode(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(token_cache, "_encode_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        tokenize_text(text, ENCODING, ShareOptions(num_shards=2))
    monkeypatch.setattr(token_cache, "_encode_shard", encode)
    made = tokenize_text(text, ENCODING, ShareOptions(num_shards=2))
    assert made.made == made.shards - 4


def test_machines_with_a_file_system_in_common_digest_a_file_once(
    text: TextOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of the device differs between two that have mounted the same file system."""
    for file in (Path(name) for pattern in [*text.text_files, *text.eval_files] for name in _glob(pattern)):  # type: ignore[misc]
        os.utime(file)
    monkeypatch.setattr("time.time_ns", lambda: 2**62)  # or the files are too new for a stamp
    tokenize_text(text, ENCODING)
    stat = Path.stat

    def mounted(path: Path, **given: bool) -> os.stat_result:
        found = stat(path, **given)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return os.stat_result([*found[:2], found.st_dev + 1, *found[3:]], fields)

    monkeypatch.setattr(Path, "stat", mounted)
    monkeypatch.setattr(shards.FileShard, "content_key", None)
    assert tokenize_text(text, ENCODING).made == 0


def _glob(pattern: str) -> list[str]:
    return [str(file) for file in Path(pattern).parent.glob(Path(pattern).name)]


def test_the_command_needs_no_torch_and_says_what_it_did(text: TextOptions, tmp_path: Path) -> None:
    line = ["tokenize", "--text_files", *(text.text_files or []), "--encoding=bytes"]
    line += [f"--token_cache_dir={tmp_path / 'store'}", "--num_proc=2"]
    code = f"""
import sys
from gpt_kit_hf.commands.main import main
assert main({line!r}) == 0
print([name for name in ("torch", "transformers", "accelerate") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.txt"))
    first, second, third, loaded = ended.stdout.splitlines()
    assert first == f"text     12 documents, {size + 12:,} tokens, from {size / 1e6:,.1f} MB"
    assert second.startswith("shards   1 of 1, 1 tokenized now in ")
    assert third == f"cache    {tmp_path / 'store'}"
    assert loaded == "[]"


def test_a_run_finds_the_tokens_by_the_same_option(
    text: TextOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of a BPE, which both train on the text."""
    same = ["--text_files", *(text.text_files or []), "--vocab_size=270", f"--token_cache_dir={tmp_path / 'store'}"]
    assert main(["tokenize", *same]) == 0
    assert " tokenized now in " in capsys.readouterr().out
    monkeypatch.setattr(token_cache, "_encode_shard", None)
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--max_position_embeddings=16", "--max_length=16"]
    run = [f"--output_dir={tmp_path / 'run'}", "--max_steps=1", "--batch_size=2", "--use_cpu", "--report_to=none"]
    assert main(["train", *same, *shape, *run, "--sample_steps=0", "--max_eval_samples=2"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["documents"] == 12


def test_the_progress_is_logged_where_no_bar_is(
    text: TextOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(token_cache, "_LOGGED", 0)
    monkeypatch.setattr(token_cache, "_FIRST_LOGGED", 0)
    assert main(["tokenize", "--text_files", *(text.text_files or []), "--encoding=bytes"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 12
    assert lines[-1].startswith("tokenized 100%, ")
    assert lines[-1].endswith(" tokens/s, 0 s left")


def test_a_share_that_does_not_exist_and_a_stream_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="shard_index=3 must be below num_shards=3"):
        ShareOptions(num_shards=3, shard_index=3)
    assert main(["tokenize", "--text_files=README.md", "--eval_files=README.md", "--streaming=true"]) == 2
    assert "streaming stores no tokens" in capsys.readouterr().err


def test_a_cache_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("some words")
    command = ["tokenize", f"--text_files={tmp_path / 'file'}", "--encoding=bytes"]
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main([*command, f"--token_cache_dir={folder}"]) == 2
        assert f"token_cache_dir '{folder}' cannot be written: " in capsys.readouterr().err
