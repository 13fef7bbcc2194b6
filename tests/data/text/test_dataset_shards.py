"""Shards of datasets against their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt_kit_hf.data.text import dataset_shards
from gpt_kit_hf.data.text.dataset_shards import DatasetShard, rows_shards
from gpt_kit_hf.data.text.tokens.token_cache import store_tokens
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, get_encoding

TEXTS = [f"row {number} é {EOS_TOKEN}\r\n" * (number % 4) for number in range(100)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_shards, "SHARD_BYTES", 500)
    monkeypatch.setattr(dataset_shards, "_ROWS_AT_ONCE", 7)


def write_shards(folder: Path, form: str) -> list[str]:
    """Write the texts in three files; return the patterns."""
    for number, (first, last) in enumerate([(0, 40), (40, 41), (41, 100)]):
        if form == "parquet":
            table = pa.table({"text": TEXTS[first:last], "n": range(first, last)})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=9)
        else:
            rows = [json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS[first:last]]
            (folder / f"{number}.jsonl").write_text("".join(rows))
    return [str(folder / f"{number}.{form}") for number in range(3)]


def stream_shards(stream: datasets.IterableDataset, column: str) -> list[DatasetShard]:
    return [
        DatasetShard(dataset=stream, source="the set", index=index, column=column)
        for index in range(stream.num_shards)
    ]


def test_rows_are_documents_in_shards_that_cover_them(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"body": TEXTS, "n": list(range(100))})
    shards = rows_shards(rows, "the set", "body")
    assert len(shards) > 5
    chunks = [(chunk.text, chunk.ends_document) for shard in shards for chunk in shard.chunks()]
    assert chunks == [(text, True) for text in TEXTS]
    assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
    assert abs(sum(shard.size for shard in shards) - rows.data.nbytes) <= len(shards)
    assert len({shard.content_key() for shard in shards}) == len(shards)
    assert shards[1].name == f"the set rows {shards[1].start} to {shards[1].stop - 1}"
    again = rows_shards(rows, "the set", "body")
    assert [shard.content_key() for shard in again] == [shard.content_key() for shard in shards]
    other = rows_shards(rows.map(lambda row: {"body": row["body"].upper()}), "the set", "body")
    assert not {shard.content_key() for shard in other} & {shard.content_key() for shard in shards}


def test_reading_rows_resumes_after_any_of_them() -> None:
    for shard in rows_shards(datasets.Dataset.from_dict({"text": TEXTS}), "the set", "text"):
        chunks = list(shard.chunks())
        for number, chunk in enumerate(chunks, start=1):
            assert list(shard.chunks(json.loads(json.dumps(chunk.next)))) == chunks[number:]


def test_rows_are_stored_as_their_texts_encoded_one_by_one() -> None:
    encoding = get_encoding("bytes")
    stored = store_tokens([*rows_shards(datasets.Dataset.from_dict({"text": TEXTS}), "a set", "text")], encoding, 3)
    # The marker spelled in a text is text, and a row without text a document without.
    expected = [[*text.encode(), 256] for text in TEXTS]
    assert [t for array in stored.chunks for t in array.__array__().tolist()] == [t for row in expected for t in row]
    assert stored.document_starts.size == 100


@pytest.mark.parametrize("value", [None, 7])
def test_a_row_that_is_not_text_is_named(value: Any) -> None:
    rows = datasets.Dataset.from_list([{"text": 5 if value else "fine"}] * 30 + [{"text": value}])
    row = 0 if value else 30
    with pytest.raises(
        DataError, match=rf"^the set row {row}: 'text' must be text, got {5 if value else None}; --on_bad_text skip"
    ):
        [list(shard.chunks()) for shard in rows_shards(rows, "the set", "text")]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_shards_of_a_stream_hold_its_rows_and_resume_after_any(tmp_path: Path, form: str) -> None:
    kind = "parquet" if form == "parquet" else "json"
    stream = datasets.load_dataset(kind, data_files=write_shards(tmp_path, form), split="train", streaming=True)
    shards = stream_shards(stream, "text")
    assert [shard.name for shard in shards] == ["the set shard 0", "the set shard 1", "the set shard 2"]
    assert [chunk.text for shard in shards for chunk in shard.chunks()] == TEXTS
    for shard in shards:
        chunks = list(shard.chunks())
        for number, chunk in enumerate(chunks, start=1):
            # As JSON, and of that moment: reading on must not move it.
            rest = list(shard.chunks(json.loads(json.dumps(chunk.next))))
            assert [p.text for p in rest] == [p.text for p in chunks[number:]]
            if rest:  # and from a place that was reached from a place
                middle = len(rest) // 2
                assert [p.text for p in shard.chunks(rest[middle].next)] == [p.text for p in rest[middle + 1 :]]


def test_a_row_of_a_stream_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": null}\n')
    stream = datasets.load_dataset("json", data_files=[str(tmp_path / "a.jsonl")], split="train", streaming=True)
    with pytest.raises(DataError, match=r"^the set shard 0, row 1: 'text' must be text, got None; --on_bad_text skip"):
        list(stream_shards(stream, "text")[0].chunks())
    with pytest.raises(DataError, match=r"^the set shard 0: no column 'body' \(text_column\); it has text$"):
        list(stream_shards(stream, "body")[0].chunks())
