from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt_kit_hf.data.instructions.reader import SkippedRows, read_rows
from gpt_kit_hf.data.instructions.rows import PlacedRow
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import RowOptions

GOOD = b'{"a": "x"}'


def read(file: Path, on_bad_row: str = "stop", skipped: SkippedRows | None = None) -> list[PlacedRow]:
    return list(read_rows(RowOptions(rows=[str(file)], on_bad_row=on_bad_row), skipped))


def places(rows: list[PlacedRow]) -> list[str]:
    return [Path(row.place).name for row in rows]


# Bad lines: what follows the file's name in the place, and an excerpt of the reason. Each is on line 2 of 3.
BAD_LINES = {
    "half a row": (b'{"a": "x"', ":2:10: ", "broken JSON"),
    "no value": (b'{"a": }', ":2:7: ", "Expecting value"),
    "single quotes": (b"{'a': 'x'}", ":2:2: ", "double quotes"),
    "trailing comma": (b'{"a": 1,}', ":2:", "broken JSON"),
    "key without quotes": (b"{a: 1}", ":2:2: ", "broken JSON"),
    "two rows on a line": (GOOD + GOOD, ":2:11: ", "more text after the row"),
    "comma after the row": (GOOD + b",", ":2:11: ", "more text after the row"),
    "control character": (b'{"a": "\x01"}', ":2:8: ", "control character"),
    "NUL": (b"\x00", ":2:1: ", "broken JSON"),
    "bad escape": (rb'{"a": "\x41"}', ":2:8: ", "escape"),
    "plain text": (b"hello", ":2:1: ", "Expecting value"),
    "a second byte order mark": (b"\xef\xbb\xbf" + GOOD, ":2:1: ", "broken JSON"),
    "comment": (b'{"a": 1 /* x */}', ":2:9: ", "broken JSON"),
    "NaN": (b'{"a": NaN}', ":2: ", "NaN"),
    "Infinity": (b'{"a": Infinity}', ":2: ", "Infinity"),
    "minus Infinity": (b'{"a": [-Infinity]}', ":2: ", "Infinity"),
    "1e999": (b'{"a": 1e999}', ":2: ", "largest float"),
    "5,000 digits": (b'{"a": ' + b"7" * 5000 + b"}", ":2: ", "5000 digits"),
    "duplicate key": (b'{"a": 1, "a": 1}', ":2: ", "'a' occurs more than once"),
    "duplicate key inside": (b'{"a": {"b": 1, "c": 2, "b": 3}}', ":2: ", "'b' occurs more than once"),
    "duplicate key, escaped": (rb'{"a": 1, "\u0061": 2}', ":2: ", "'a' occurs more than once"),
    "array": (b"[1, 2]", ":2: ", "object, got a list of 2"),
    "text": (b'"x"', ":2: ", "object, got 'x'"),
    "number": (b"17", ":2: ", "object, got 17"),
    "null": (b"null", ":2: ", "object, got None"),
    "true": (b"true", ":2: ", "object, got True"),
    "not UTF-8": (b'{"a": "\xff"}', ":2: ", "byte 0xff"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), ":2: ", "byte 0xe9"),
    "cut UTF-8": (b'{"a": "\xe2\x82"}', ":2: ", "byte 0xe2"),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', ":2: ", "byte 0xed"),
    "nested too deep": (b"[" * 200_000, ":2:1: ", "nested too deep"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_stops_with_its_place_or_is_counted(name: str, tmp_path: Path) -> None:
    line, place, reason = BAD_LINES[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(DataError) as stopped:
        read(file)
    message = str(stopped.value)
    assert message.startswith(f"{file}{place}")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400
    skipped = SkippedRows()
    assert places(read(file, "skip", skipped)) == ["rows.jsonl:1", "rows.jsonl:3"]
    assert len(skipped) == 1
    (kind,) = skipped.counts
    assert f"{skipped.first(kind)[0].place}: {skipped.first(kind)[0].reason}" == message


# Elements of an array whose end is known, so that the next one can be read.
SKIPPABLE = [name for name, case in BAD_LINES.items() if case[1] == ":2: "]


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_element_of_an_array_is_skipped_where_its_end_is_known(name: str, tmp_path: Path) -> None:
    element, _, reason = BAD_LINES[name]
    file = tmp_path / "rows.json"
    file.write_bytes(b"[" + GOOD + b",\n" + element + b",\n" + GOOD + b"]")
    with pytest.raises(DataError, match=r"rows\.json:[23]:") as stopped:
        read(file)
    skipped = SkippedRows()
    if name in SKIPPABLE:
        assert reason in str(stopped.value)
        assert places(read(file, "skip", skipped)) == ["rows.json:1", "rows.json:3"]
        assert len(skipped) == 1
    else:
        with pytest.raises(DataError, match=r"rows\.json:[23]:\d+: .*so no row of it can be skipped") as stopped:
            read(file, "skip", skipped)
    assert "\n" not in str(stopped.value)


BAD_FILES = {
    "empty": ("rows.jsonl", b"", "empty"),
    "white space": ("rows.jsonl", b" \n\r\n\t", "only white space"),
    "a byte order mark alone": ("rows.json", b"\xef\xbb\xbf", "only white space"),
    "empty array": ("rows.json", b"[ ]", "holds no row"),
    "array without end": ("rows.json", b"[" + GOOD, ":1:12: "),
    "array with a trailing comma": ("rows.json", b"[" + GOOD + b",\n]", ":2:1: "),
    "array without commas": ("rows.json", b"[" + GOOD + b"\n" + GOOD + b"]", ":2:1: "),
    "text after the array": ("rows.json", b"[" + GOOD + b"]\n\nx", ":3: "),
    "bytes between elements": ("rows.json", b"[" + GOOD + b",\n\xff]", ":2:1: not UTF-8"),
    "UTF-16 without a mark": ("rows.jsonl", '{"a": 1}'.encode("utf-16-le"), "give --encoding_of_files utf-16-le"),
    "CSV in UTF-16 without a mark": ("rows.csv", "a,b\n1,2\n".encode("utf-16-be"), "--encoding_of_files utf-16-be"),
    "a table by columns": (
        "rows.json",
        b'{"a": {"0": "x", "1": "y"}, "b": {"0": 1}}',
        "its keys: 'a (0, 1), b (0)': the file is a table",
    ),
    "a table by its index": (
        "rows.json",
        b'{"0": {"a": "x"}, "1": {"a": "y"}}',
        'df.to_json(file, orient="records", lines=True)',
    ),
    "a split table": (
        "rows.json",
        b'{"columns": ["a"], "index": [0], "data": [["x"]]}',
        "the file is a table, not rows",
    ),
    "lists of cells": ("rows.json", b'{"a": ["x", "y"], "b": ["z", null]}', "the file is a table, not rows"),
    "a row over several lines": ("rows.json", b'{\n"a": 1\n}', "one row is one line here"),
    "no gzip": ("rows.jsonl.gz", GOOD, "cannot be read"),
    "half a gzip": ("rows.jsonl.gz", gzip.compress(random.Random(0).randbytes(5000))[:2000], "cannot be read"),
    "empty gzip": ("rows.jsonl.gz", gzip.compress(b""), "empty"),
    "no zstd": ("rows.json.zst", GOOD, "cannot be read"),
    "no Parquet": ("rows.parquet", b"PAR1 and then nothing", "cannot be read as Parquet"),
    "unknown ending": ("rows.xlsx", GOOD, "must end in"),
    "rows with commas": (
        "rows.json",
        b'{"a": "x",\n "b": 1\n},\n{"a": "y",\n "b": 1\n},\n',
        "one row is one line here",
    ),
    "lines with commas": (
        "rows.jsonl",
        GOOD + b",\n" + GOOD + b",\n",
        ":1:11: broken JSON: more text after the row, a comma; ",
    ),
    "several splits": (
        "rows.json",
        b'{"train": [' + GOOD + b'], "validation": [' + GOOD + b"]}",
        "holds several lists of rows, 'train' and 'validation'",
    ),
    "several lists": (
        "rows.json",
        b'{"train": [' + GOOD + b'], "data": [' + GOOD + b"]}",
        "holds several lists of rows, 'train' and 'data'",
    ),
    "a fault in a list of an object": (
        "rows.json",
        b'{"v": 1,\n"data": [' + GOOD + b",\n{]}",
        ":3:2: broken JSON",
    ),
    "an empty list in an object": ("rows.json", b'{"data": []}', "holds no row"),
    "no header": ("rows.csv", b"\n,,\n1,2,3\n", ":2: there is no header"),
    "a column twice": ("rows.csv", b"a,b,a\n1,2,3\n", ":1: the column 'a' occurs more than once"),
    "a header alone": ("rows.tsv", b"a\tb\n", "holds no row"),
    "a quote without an end": ("rows.csv", b'a,b\n1,2\n"3,4\n5,6\n', ":3: not a row of CSV: "),
    "text after a quote": ("rows.csv", b'a,b\n1,2\n"3"x,4\n', ":3: not a row of CSV: "),
    "Parquet in gzip": ("rows.parquet.gz", GOOD, "must end in"),
}


SKIPPABLE_FILES = {
    "a row over several lines",
    "rows with commas",
    "lines with commas",
    "a table by columns",
    "a table by its index",
    "a split table",
    "lists of cells",
}


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_stops_whether_rows_are_skipped_or_not(name: str, on_bad_row: str, tmp_path: Path) -> None:
    file_name, content, reason = BAD_FILES[name]
    (tmp_path / file_name).write_bytes(content)
    skipped = SkippedRows()
    if on_bad_row == "skip" and name in SKIPPABLE_FILES:
        assert read(tmp_path / file_name, "skip", skipped) == []
        assert len(skipped) > 0
        return
    with pytest.raises(UsageError) as stopped:
        read(tmp_path / file_name, on_bad_row, skipped)
    assert file_name in str(stopped.value)
    assert reason in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson", "rows.jsonl.gz", "rows.json.zst"])
def test_lines_are_read_as_the_standard_library_reads_them(name: str, mark: bytes, end: bytes, tmp_path: Path) -> None:
    rows = [{"a": "é\u2028\x85日", "n": 1.5, "l": [1, None, {"b": True}]}, {}, {"a": "\\n"}]
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0).encode() for number, row in enumerate(rows)]
    content = mark + end + lines[0] + end + end + lines[1] + end + lines[2]
    write(tmp_path / name, content)
    found = read(tmp_path / name)
    assert [row.row for row in found] == rows
    assert places(found) == [f"{name}:{line}" for line in (2, 4, 5)]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz", "rows.json.zst"])
@pytest.mark.parametrize("indent", [None, 0, 4])
def test_array_elements_are_placed_where_they_begin(indent: int | None, name: str, tmp_path: Path) -> None:
    rows = [{"a": "]}\n[{", "b": ["\r\n"]}, {"a": "é"}, {"c": {"d": []}}]
    text = "\n \n" + json.dumps(rows, indent=indent, ensure_ascii=False).replace("\n", "\r\n") + "\r\n"
    write(tmp_path / name, b"\xef\xbb\xbf" + text.encode())
    found = read(tmp_path / name)
    assert [row.row for row in found] == rows
    numbered = text.split("\n")
    firsts = ['"a": "]}', '"a": "é"', '"c":']
    expected = []
    for first in firsts:  # with an indent, the brace is on the line before its first key
        line = next(number for number, content in enumerate(numbered, 1) if first in content)
        expected.append(f"{name}:{line - (indent is not None)}")
    assert places(found) == expected


def write(file: Path, content: bytes) -> None:
    with pa.output_stream(str(file), compression={".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())) as stream:
        stream.write(content)


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.TSV", "rows.CSV.ZST"])
def test_a_table_is_read_as_the_standard_library_reads_it(name: str, tmp_path: Path) -> None:
    rows = [{"a": "é, 日", "b": "two\nlines"}, {"a": "", "b": 'say "x"\t'}, {"a": " 1.50 ", "b": "NA"}]
    delimiter = "\t" if "tsv" in name.lower() else ","
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["a", "b"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    write(tmp_path / name, b"\xef\xbb\xbf" + text.getvalue().encode())
    found = read(tmp_path / name)
    assert [row.row for row in found] == rows
    assert places(found) == [f"{name}:{line}" for line in (2, 4, 5)]


def test_a_row_of_another_width_or_not_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"a,b\n1,2\n\n1,2,3\n\xff,2\n1\n3,4\n")
    with pytest.raises(DataError, match=r"rows\.csv:4: a row of 3 cells under 2 columns: "):
        read(file)
    skipped = SkippedRows()
    assert places(read(file, "skip", skipped)) == ["rows.csv:2", "rows.csv:7"]
    assert skipped.counts == {"number of cells": 2, "not UTF-8": 1}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_rows_in_an_object_is_read_with_places(indent: int | None, name: str, tmp_path: Path) -> None:
    rows = [{"a": "x", "data": [1]}, {"a": "]}"}]
    text = json.dumps({"version": [1], "rows": rows, "licence": {"data": []}}, indent=indent)
    (tmp_path / name).write_text(text)
    found = read(tmp_path / name)
    assert [row.row for row in found] == rows
    opening = [number for number, line in enumerate(text.split("\n"), start=1) if line == "  {"]
    assert places(found) == [f"{name}:{line}" for line in (opening or [1, 1])]


def test_rows_that_hold_a_list_are_rows(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "data": [{"b": 1}]}, {"instruction": "a", "data": [{"b": 1}]}]
    for number in (1, 2):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:number]))
        assert [row.row for row in read(tmp_path / "rows.jsonl")] == rows[:number]
    others = [{"data": [{"b": 1}]}, {"data": [{"b": 1}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    assert [row.row for row in read(tmp_path / "rows.jsonl")] == others


def test_real_rows_equal_what_the_standard_library_reads(shared_data: Path) -> None:
    file = shared_data / "instruction-data.json"
    found = read(file)
    assert [row.row for row in found] == json.loads(file.read_text(encoding="utf-8"))
    lines = file.read_text(encoding="utf-8").split("\n")
    assert all(lines[int(row.place.rpartition(":")[2]) - 1].strip() == "{" for row in found)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_of_ten_megabytes_is_read(name: str, tmp_path: Path) -> None:
    row = {"a": "word " * 2_000_000}
    (tmp_path / name).write_text(json.dumps([row] if name == "rows.json" else row))
    assert read(tmp_path / name)[0].row == row


def test_files_are_read_in_order_after_all_names_are_checked(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "c.txt").write_bytes(GOOD)
    rows = read_rows(RowOptions(rows=[str(tmp_path / "*.jsonl")]))
    assert places(list(rows)) == ["a.jsonl:1", "b.jsonl:1"]
    with pytest.raises(UsageError, match=r"c\.txt"):
        next(read_rows(RowOptions(rows=[str(tmp_path / "*.jsonl"), str(tmp_path / "c.txt")])))
    with pytest.raises(DataError, match="no such file"):
        next(read_rows(RowOptions(rows=[str(tmp_path / "missing.jsonl")])))


def test_parquet_rows_have_their_number_and_nulls(tmp_path: Path) -> None:
    rows = [{"a": f"x{n}", "m": [{"role": "user", "content": None}]} for n in range(130)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=50)
    found = read(tmp_path / "rows.parquet")
    assert [row.row for row in found] == rows
    assert places(found) == [f"rows.parquet row {n}" for n in range(130)]


def not_utf8_table() -> pa.Table:
    column = pa.array([b"good", b"\xff", b"good"], pa.binary()).cast(pa.string(), safe=False)
    return pa.table({"a": column})


def test_parquet_bytes_that_are_not_utf8_are_a_fault_of_their_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(not_utf8_table(), file, store_schema=False)
    with pytest.raises(DataError, match=r"rows\.parquet row 1: not UTF-8 text \(byte 0xff\)"):
        read(file)
    skipped = SkippedRows()
    assert places(read(file, "skip", skipped)) == ["rows.parquet row 0", "rows.parquet row 2"]
    assert skipped.counts == {"not UTF-8": 1}


def test_parquet_without_rows_or_with_a_column_twice_stops(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="holds no row"):
        read(tmp_path / "rows.parquet")
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="'a' occurs more than once"):
        read(tmp_path / "twice.parquet")


def test_a_dataset_folder_is_read_by_its_split(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": None}, {"a": "y", "b": 1}]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    datasets.Dataset.from_list(rows[:1] * 3).to_json(tmp_path / "test.jsonl")
    found = list(read_rows(RowOptions(dataset_name=str(tmp_path))))
    assert found == [(f"{tmp_path} row {number}", row) for number, row in enumerate(rows)]
    assert len(list(read_rows(RowOptions(dataset_name=str(tmp_path), dataset_train_split="test")))) == 3
    with pytest.raises(DataError, match="cannot be loaded"):
        next(read_rows(RowOptions(dataset_name=str(tmp_path), dataset_train_split="missing")))
    with pytest.raises(DataError, match="cannot be loaded"):
        next(read_rows(RowOptions(dataset_name=str(tmp_path / "nowhere"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rows"),
        ({"rows": ["a.json"], "dataset_name": "b"}, "exactly one of rows"),
        ({"rows": ["a.json"], "dataset_train_split": "train"}, "are for dataset_name"),
        ({"rows": ["a.json"], "on_bad_row": "skipp"}, "did you mean 'skip'"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RowOptions(**options)  # type: ignore[arg-type]


def test_skipped_rows_keep_the_first_of_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"1\n" * 7 + b"NaN\n" + GOOD + b"\n" + b"{]\n" * 2)
    skipped = SkippedRows(keep=2)
    assert len(read(file, "skip", skipped)) == 1
    assert len(skipped) == 10
    assert skipped.counts == {"not an object": 7, "NaN or infinity": 1, "broken JSON": 2}
    assert [row.place for row in skipped.first("not an object")] == [f"{file}:1", f"{file}:2"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize("codec", ["cp1252", "utf-16", "utf-16-le", "shift_jis"])
def test_rows_are_read_in_the_encoding_that_is_marked_or_named(name: str, codec: str, tmp_path: Path) -> None:
    row = {"a": "十七" if codec == "shift_jis" else "café", "b": "x"}
    text = {
        "rows.jsonl": json.dumps(row, ensure_ascii=False) + "\n",
        "rows.json": json.dumps([row], ensure_ascii=False),
    }
    data = text.get(name, f"a,b\n{row['a']},x\n").encode(codec)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    named = None if codec == "utf-16" else codec
    found = list(read_rows(RowOptions(rows=[str(tmp_path / name)], encoding_of_files=named)))
    assert [each.row for each in found] == [row]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_rows_in_another_encoding_name_the_option_that_reads_them(name: str, tmp_path: Path) -> None:
    text = {"rows.jsonl": '{"a": "café"}', "rows.json": '[{"a": "café"}]'}.get(name, "a\ncafé\n")
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    with pytest.raises(
        DataError, match=r"not UTF-8 text \(byte 0xe9\); it looks like cp1252, .*--encoding_of_files cp1252"
    ):
        read(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: not text in shift_jis: name its encoding by --encoding_of_files"):
        list(read_rows(RowOptions(rows=[str(tmp_path / name)], encoding_of_files="shift_jis")))
    with pytest.raises(UsageError, match="encoding_of_files"):
        RowOptions(rows=["a.csv"], encoding_of_files="no-codec")


def test_csv_with_carriage_returns_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'a,b\r1,"2\r3"\r4,5\r')
    assert [row.row for row in read(tmp_path / "rows.csv")] == [{"a": "1", "b": "2\r3"}, {"a": "4", "b": "5"}]


def test_a_folder_that_datasets_saved_is_not_read_as_files(tmp_path: Path) -> None:
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(UsageError, match=rf"is read by --dataset_name {re.escape(str(tmp_path))}$"):
        next(read_rows(RowOptions(rows=[str(tmp_path)])))
