"""From options to tokens to train on and tokens held out."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from gpt_kit_hf import (
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TrainingOptions,
    WindowOptions,
    train,
)
from gpt_kit_hf.data.text import corpus, shards, sources
from gpt_kit_hf.data.text.corpus import Corpus, choose_encoding, prepare_corpus
from gpt_kit_hf.data.text.files import spans
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import EncodingOptions, TextOptions
from gpt_kit_hf.storage.atomic_files import read_jsonl
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, fingerprint, get_encoding, train_bpe

BYTES = EncodingOptions(encoding="bytes")


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards, sources):
        monkeypatch.setattr(module, "SHARD_BYTES", 500, raising=False)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 60)
    monkeypatch.setattr(spans, "_BLOCK", 41)


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)


def prepared(seed: int = 0, **options: Any) -> Corpus:
    text = TextOptions(**options)
    return prepare_corpus(text, choose_encoding(text, BYTES), seed=seed)


def text_of(stream: TokenStream) -> str:
    return get_encoding("bytes").decode(stream.read(0, len(stream)).tolist())


def test_a_corpus_is_split_and_held_out_files_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, a="abcdefghij" * 30, held="0123456789")
    options = TextOptions(text_files=[str(tmp_path / "a.txt")], eval_files=[str(tmp_path / "held.txt")])
    encoding = choose_encoding(options, BYTES)
    made = prepare_corpus(options, encoding, seed=0)
    assert text_of(made.eval) == "0123456789" + EOS_TOKEN
    assert (len(made.train), made.documents) == (301, 1)
    cut = prepared(text_files=[str(tmp_path / "a.txt")])
    assert (len(cut.train), len(cut.eval)) == (271, 30)
    assert cut.fingerprint != made.fingerprint
    trained = choose_encoding(options, EncodingOptions(vocab_size=270))
    assert 257 < trained.n_vocab <= 270
    assert prepare_corpus(options, trained, seed=0).fingerprint != made.fingerprint


def test_the_fingerprint_is_of_the_text_and_the_split_and_not_of_names_or_processes(tmp_path: Path) -> None:
    write(tmp_path, a="abcdefghij" * 30, b="klmnopqrst" * 30)
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    apart = tmp_path / "apart"
    apart.mkdir()
    write(apart, a="abcdefghij" * 30)
    base = prepared(text_files=[a, b]).fingerprint
    assert prepared(text_files=[f"{tmp_path}/*.txt"], num_proc=3).fingerprint == base
    others = [
        prepared(text_files=[b, a]),
        prepared(text_files=[a]),
        prepared(text_files=[a, b], eval_fraction=0.2),
        prepared(text_files=[a, b], eval_max_tokens=10),
        prepared(text_files=[a, b], seed=1),
        prepared(text_files=[a, b], document_separator="j"),
        prepared(text_files=[a, b], eval_files=[str(apart / "a.txt")]),
        prepared(mixture=[f"1:{a}", f"1:{b}"]),
        prepared(mixture=[f"1:{a}", f"2:{b}"]),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 10
    write(tmp_path, a="abcdefghij" * 29 + "abcdefghiJ")
    assert prepared(text_files=[a, b]).fingerprint != base


def test_held_out_text_is_bounded(tmp_path: Path) -> None:
    write(tmp_path, a="abcdefghij" * 300)
    made = prepared(text_files=[str(tmp_path / "a.txt")], eval_max_tokens=50)
    assert (len(made.train), len(made.eval)) == (2951, 50)
    assert text_of(made.train) + text_of(made.eval) == "abcdefghij" * 300 + EOS_TOKEN


def test_each_source_of_a_mixture_gives_its_share_of_the_held_out_text(tmp_path: Path) -> None:
    write(tmp_path, a="a" * 999, b="b" * 499, c="c" * 99)
    made = prepared(mixture=[f"{weight}:{tmp_path}/{name}.txt" for weight, name in ((2, "a"), (1, "b"), (1, "c"))])
    assert made.weights == (2.0, 1.0, 1.0)
    assert [text_of(part) for part in made.sources] == ["a" * 900, "b" * 450, "c" * 90]
    assert text_of(made.train) == "a" * 900 + "b" * 450 + "c" * 90
    ended = [f"{name * (size - 1)}{EOS_TOKEN}" for name, size in (("a", 100), ("b", 50), ("c", 10))]
    assert text_of(made.eval) == "".join(ended)
    assert made.eval.document_starts.tolist() == [0, 100, 150]
    assert made.train.document_starts.tolist() == [0, 900, 1350]
    assert made.documents == 3


@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize("num_proc", [1, 3])
def test_tokens_are_those_of_the_encoding_with_an_end_after_each_document(tmp_path: Path, num_proc: int) -> None:
    encoding = get_encoding("bytes")
    texts = [f"document {i} \u00e9 {EOS_TOKEN}" for i in range(150)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write(tmp_path, held="x")
    end = encoding.encode_single_token(EOS_TOKEN)
    files = {"text_files": [str(tmp_path / "rows.jsonl")], "eval_files": [str(tmp_path / "held.txt")]}
    # The mark at the end of a text is its end, once.
    made = prepared(**files, num_proc=num_proc)
    expected = [[*text.removesuffix(EOS_TOKEN).encode(), end] for text in texts]
    np.testing.assert_array_equal(made.train.read(0, len(made.train)), np.concatenate(expected))
    assert made.documents == 150
    # Or text, as it is everywhere else.
    made = prepared(**files, num_proc=num_proc, eos_in_text="keep")
    expected = [[*text.encode(), end] for text in texts]
    np.testing.assert_array_equal(made.train.read(0, len(made.train)), np.concatenate(expected))
    np.testing.assert_array_equal(made.train.document_starts, np.cumsum([0, *map(len, expected)])[:-1])
    assert made.documents == 150
    assert len(made.train.views(0, len(made.train))) > 5


@pytest.mark.usefixtures("_small_shards")
def test_a_vocabulary_is_trained_on_the_whole_of_a_small_corpus(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["sea", "storm", "crown", "12", "it's", "\n\n"], k=300)) for _ in range(6)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    options = TextOptions(text_files=[str(tmp_path / "*.gz")])
    chosen = choose_encoding(options, EncodingOptions(vocab_size=300))
    assert fingerprint(chosen) == fingerprint(train_bpe(texts, 300, pad_token=True))
    assert fingerprint(chosen) != fingerprint(train_bpe(texts[:3], 300, pad_token=True))


@pytest.mark.usefixtures("_small_shards")
def test_a_vocabulary_of_a_large_corpus_has_seen_some_of_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "abcdefgh"
    write(tmp_path, **{name: f"{name * 4} " * 300 for name in names})
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 60)
    options = TextOptions(text_files=[f"{tmp_path}/*.txt"])
    text = "".join(corpus._vocabulary_text(options, 2_000))
    assert {name for name in names if name * 4 in text} == set(names)
    assert 1_500 < len(text) < 5_000 < sum(file.stat().st_size for file in tmp_path.glob("*.txt"))


def test_an_encoding_is_one_of_those_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown encoding 'byte'; did you mean 'bytes'"):
        EncodingOptions(encoding="byte")
    with pytest.raises(UsageError, match="vocab_size must be at least 258"):
        EncodingOptions(vocab_size=257)
    with pytest.raises(UsageError, match="vocab_text_mb must be at least 1, got 0"):
        EncodingOptions(vocab_text_mb=0)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(("name", "content"), [("a.txt", " \n\t\n"), ("a.jsonl", "\n\n"), ("b.txt.gz", " \n")])
def test_a_text_of_white_space_is_refused(tmp_path: Path, name: str, content: str, held_out: bool) -> None:
    write(tmp_path, fine="fine " * 30)
    file = tmp_path / name
    file.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    named: dict[str, Any] = (
        {"text_files": [f"{tmp_path}/fine.txt"], "eval_files": [str(file)]}
        if held_out
        else {"text_files": [str(file)]}
    )
    with pytest.raises(DataError, match=rf"{name}: only white space, there is no text"):
        prepared(**named)


def test_a_run_on_a_mixture_continues_to_the_bit(tmp_path: Path) -> None:
    """Two sources of unequal sizes, packed; killed as after the checkpoint of its fourth step."""
    write(tmp_path, a="The old king sees the sea.\n" * 60, b="A ship.\n" * 30, held="The new fool sees a ship.\n" * 9)

    def options(folder: str, **changes: Any) -> RunOptions:
        shape: dict[str, Any] = {
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 16,
            "max_position_embeddings": 16,
            "dropout": 0.1,
        }
        training = {
            "batch_size": 6,
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "eval_steps": 100,
            "save_steps": 4,
        }
        quiet = {
            "sample_steps": 0,
            "report_to": ["none"],
            "use_cpu": True,
            "mixed_precision": "fp32",
            "save_total_limit": 9,
        }
        return RunOptions(
            training=TrainingOptions(output_dir=str(tmp_path / folder), **{**training, **quiet, **changes}),
            text=TextOptions(
                mixture=[f"3:{tmp_path}/a.txt", f"1:{tmp_path}/b.txt"],
                eval_files=[f"{tmp_path}/held.txt"],
                document_separator="\n",
            ),
            encoding=BYTES,
            windows=WindowOptions(max_length=16, packing=True),
            model=ModelOptions(**shape),
            optimizer=OptimizerOptions(learning_rate=5e-3, warmup_steps=2),
        )

    train(options("whole"), stream=None)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for file in [path for path in (tmp_path / "killed").iterdir() if path.is_file()]:
        if file.name not in ("options.json", "metrics.jsonl", "run.json"):
            file.unlink()
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    del record["results"]
    (tmp_path / "killed" / "run.json").write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000008")
    train(options("killed", resume=True, per_device_train_batch_size=4, dataloader_num_workers=2), stream=None)
    whole, killed = ([tmp_path / name / "checkpoints" / "step-00000008"][0] for name in ("whole", "killed"))
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    lines = [list(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("whole", "killed")]
    losses = [[r["loss"] for r in each if r["kind"] == "train"] for each in lines]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


def test_text_that_is_trained_is_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    (tmp_path / "sub").mkdir()
    options = TextOptions(text_files=[str(tmp_path / "*.txt")], eval_files=[str(tmp_path / "sub" / ".." / "a.txt")])
    with pytest.raises(UsageError, match=r"eval_files: .*a\.txt is trained on as well"):
        prepare_corpus(options, get_encoding("bytes"), seed=0)
    with pytest.raises(UsageError, match="dataset_test_split='train' is the split to train on"):
        TextOptions(dataset_name="x", dataset_test_split="train")


def test_a_vocabulary_is_trained_on_no_more_text_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
    monkeypatch.setattr(sources, "SHARD_BYTES", 5000)
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(60_000)))
    text = "".join(corpus._vocabulary_text(TextOptions(text_files=[str(tmp_path / "a.txt")]), 50_000))
    assert 30_000 < len(text) < 110_000
    assert int(text.rsplit("line ", 1)[1]) > 50_000  # from all over the corpus


def test_a_streamed_split_is_held_out_without_storing_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(f'{{"text": "{split} {i}"}}\n' for i in range(50)))
    options = TextOptions(dataset_name=str(tmp_path), dataset_test_split="test", streaming=True, eval_max_tokens=45)
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: load(*a, **k) if k["streaming"] else pytest.fail("stored")
    )
    held_out, key, reading = corpus.prepare_eval(options, get_encoding("bytes"))
    assert bytes(held_out.read(0, 6).tolist()) == b"test 0"
    assert 45 <= len(held_out) < 60
    assert held_out.document_starts.tolist()[:3] == [0, 7, 14]
    assert key == corpus.prepare_eval(options, get_encoding("bytes"))[1]
    assert reading.facts()["documents_read"] == reading.used == len(held_out.document_starts)
