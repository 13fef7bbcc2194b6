"""Units of datasets against their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt_kit_hf.data.text import dataset_shards
from gpt_kit_hf.data.text.dataset_shards import row_units, shard_units
from gpt_kit_hf.data.text.token_cache import store_tokens
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.encodings import END_OF_TEXT, get_encoding

TEXTS = [f"row {number} é {END_OF_TEXT}\r\n" * (number % 4) for number in range(100)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_shards, "UNIT_BYTES", 500)
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


def test_rows_are_documents_in_units_that_cover_them(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"body": TEXTS, "n": list(range(100))})
    units = row_units(rows, "the set", "body")
    assert len(units) > 5
    assert [(part.text, part.ends_document) for unit in units for part in unit.parts()] == [(t, True) for t in TEXTS]
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert abs(sum(unit.size for unit in units) - rows.data.nbytes) <= len(units)
    assert len({unit.content_key() for unit in units}) == len(units)
    assert units[1].name == f"the set rows {units[1].start} to {units[1].stop - 1}"
    again = row_units(rows, "the set", "body")
    assert [unit.content_key() for unit in again] == [unit.content_key() for unit in units]
    other = row_units(rows.map(lambda row: {"body": row["body"].upper()}), "the set", "body")
    assert not {unit.content_key() for unit in other} & {unit.content_key() for unit in units}


def test_reading_rows_goes_on_after_any_of_them() -> None:
    for unit in row_units(datasets.Dataset.from_dict({"text": TEXTS}), "the set", "text"):
        parts = list(unit.parts())
        for number, part in enumerate(parts, start=1):
            assert list(unit.parts(json.loads(json.dumps(part.next)))) == parts[number:]


def test_rows_are_stored_as_their_texts_encoded_one_by_one() -> None:
    encoding = get_encoding("bytes")
    stored = store_tokens([*row_units(datasets.Dataset.from_dict({"text": TEXTS}), "a set", "text")], encoding, 3)
    # The marker spelled in a text is text, and a row without text a document without.
    expected = [[*text.encode(), 256] for text in TEXTS]
    assert [t for piece in stored.pieces for t in piece.__array__().tolist()] == [t for row in expected for t in row]
    assert stored.document_starts.size == 100


@pytest.mark.parametrize("value", [None, 7])
def test_a_row_that_is_no_text_is_named(value: Any) -> None:
    rows = datasets.Dataset.from_list([{"text": 5 if value else "fine"}] * 30 + [{"text": value}])
    row = 0 if value else 30
    with pytest.raises(DataError, match=rf"^the set row {row} must hold text, got {5 if value else None}$"):
        [list(unit.parts()) for unit in row_units(rows, "the set", "text")]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_shards_of_a_stream_hold_its_rows_and_go_on_after_any(tmp_path: Path, form: str) -> None:
    kind = "parquet" if form == "parquet" else "json"
    stream = datasets.load_dataset(kind, data_files=write_shards(tmp_path, form), split="train", streaming=True)
    units = shard_units(stream, "the set", "text")
    assert [unit.name for unit in units] == ["the set shard 0", "the set shard 1", "the set shard 2"]
    assert [part.text for unit in units for part in unit.parts()] == TEXTS
    for unit in units:
        parts = list(unit.parts())
        for number, part in enumerate(parts, start=1):
            # As JSON, and of that moment: reading on must not move it.
            rest = list(unit.parts(json.loads(json.dumps(part.next))))
            assert [p.text for p in rest] == [p.text for p in parts[number:]]
            if rest:  # and from a place that was reached from a place
                middle = len(rest) // 2
                assert [p.text for p in unit.parts(rest[middle].next)] == [p.text for p in rest[middle + 1 :]]


def test_a_row_of_a_stream_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": null}\n')
    stream = datasets.load_dataset("json", data_files=[str(tmp_path / "a.jsonl")], split="train", streaming=True)
    with pytest.raises(DataError, match=r"^the set shard 0, row 1 must hold text, got None$"):
        list(shard_units(stream, "the set", "text")[0].parts())
    with pytest.raises(DataError, match=r"^the set shard 0: no column 'body' \(text_column\); it has text$"):
        list(shard_units(stream, "the set", "body")[0].parts())
