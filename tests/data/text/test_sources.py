"""Options, and the sources and documents that they name."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from gpt_kit_hf.data.instructions.reader import read_rows
from gpt_kit_hf.data.text.sources import TextSource, eval_source, train_sources
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import RowOptions, TextOptions
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN


def write(folder: Path, **texts: str | bytes) -> None:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)


def source(**options: Any) -> TextSource:
    ((weight, found),) = train_sources(TextOptions(**options))
    assert weight == 1.0
    return found


def documents(found: TextSource, *, streamed: bool = False) -> list[str]:
    """The documents of a source; each is short enough to come whole."""
    shards: Iterable[Any] = found.streamed_shards(True) if streamed else found.shards(True)
    chunks = [chunk for shard in shards for chunk in shard.chunks()]
    assert all(chunk.ends_document for chunk in chunks)
    return [chunk.text for chunk in chunks]


def in_files(*patterns: Path, **options: Any) -> list[str]:
    return documents(source(text_files=[str(pattern) for pattern in patterns], **options))


def test_files_become_documents_exactly_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, a="one\r\ntwo\n", b="\ufeffthree", c="", d="\u00e9\U0001f600", e=" \n")
    assert in_files(tmp_path / "*.txt") == ["one\r\ntwo\n", "three", "\u00e9\U0001f600"]


def test_a_separator_ends_documents_inside_a_file(tmp_path: Path) -> None:
    write(tmp_path, a=f"one{EOS_TOKEN}two{EOS_TOKEN}\n{EOS_TOKEN}three")
    assert in_files(tmp_path / "a.txt", document_separator=EOS_TOKEN) == ["one", "two", "three"]
    assert in_files(tmp_path / "a.txt", eos_in_text="keep") == [(tmp_path / "a.txt").read_text()]


def test_files_of_several_forms_are_one_source_in_the_order_named(tmp_path: Path) -> None:
    write(tmp_path, z="text")
    (tmp_path / "a.jsonl").write_text('{"body": "row 1"}\n{"body": "row 2"}')
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    found = in_files(tmp_path / "z.txt", tmp_path / "[ab].*", text_column="body")
    assert found == ["text", "row 1", "row 2", "packed"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for text in ("before", "afterwards"):
        write(tmp_path, a=text)
        assert in_files(tmp_path / "a.txt") == [text]


def test_a_file_of_the_same_name_size_and_time_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("one", "aaaa"), ("two", "bbbb")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, d=text)
        os.utime(tmp_path / name / "d.txt", (0, 0))
        monkeypatch.chdir(tmp_path / name)
        assert documents(source(text_files=["d.txt"])) == [text]


# --- which files


def test_patterns_name_each_file_once_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, b="b", a="a", empty="")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", c="c")
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    found = find_files(
        [str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt"), str(tmp_path / "sub" / ".." / "b.txt")]
    )
    assert [file.name for file in found] == ["b.txt", "a.txt", "c.txt"]


def test_a_name_that_exists_is_meant_as_it_stands(tmp_path: Path) -> None:
    write(tmp_path, **{"a[1]": "brackets", "a1": "none"})
    assert in_files(tmp_path / "a[1].txt") == ["brackets"]
    (tmp_path / "a[1].txt").unlink()
    assert in_files(tmp_path / "a[1].txt") == ["none"]


def test_the_standard_library_is_text_that_is_always_there() -> None:
    files = find_files(["python-stdlib"])
    assert len(files) > 300
    assert "argparse.py" in {file.name for file in files}
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)


@pytest.mark.parametrize(
    ("content", "pattern", "message"),
    [
        (None, "missing.txt", "no such file"),
        (None, "*.txt", "no such file"),
        (b"", "a.txt", "empty, there is no text"),
        (b"", "*", "empty, there is no text"),
        (b"fine\nthen \xff\n", "a.txt", r"a\.txt:2: not UTF-8 text \(byte 0xff at offset 10\)"),
        ("", "", "empty, there is no text"),
    ],
)
@pytest.mark.parametrize("option", ["text_files", "mixture", "eval_files"])
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes | str | None, pattern: str, message: str, option: str
) -> None:
    if content is not None:
        write(tmp_path, a=content)
    place = str(tmp_path / pattern) if pattern else str(tmp_path)
    if option == "eval_files":
        found = eval_source(TextOptions(text_files=["python-stdlib"], eval_files=[place]))
    else:
        options = {"text_files": [place]} if option == "text_files" else {"mixture": [f"1:{place}"]}
        found = source(**options) if option == "text_files" else train_sources(TextOptions(**options))[0][1]  # type: ignore[arg-type]
    assert found is not None
    with pytest.raises(DataError, match=message) as caught:
        documents(found)
    assert str(caught.value).startswith(option) or "not UTF-8" in message


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="x")
    opened = Path.open

    def refused(file: Path, *arguments: Any, **named: Any) -> Any:
        if file.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return opened(file, *arguments, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        in_files(tmp_path / "a.txt")


# --- datasets


def test_a_dataset_folder_is_read_by_its_text_column(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.mkdir()
    (body / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    for streamed in (False, True):
        with pytest.raises(DataError, match=r"named( row 1| shard 0, row 1): 'text' must be text, got None"):
            documents(source(dataset_name=str(tmp_path / "named")), streamed=streamed)
        rows = source(dataset_name=str(body), text_column="body")
        assert documents(rows, streamed=streamed) == ["one", "two"]
        with pytest.raises(DataError, match=r"'text'.*(its columns:|it has) body"):
            documents(source(dataset_name=str(body)), streamed=streamed)
        with pytest.raises(DataError, match=r"dataset_name .*nothing', split 'train', cannot be loaded"):
            documents(source(dataset_name=str(tmp_path / "nothing")), streamed=streamed)


def test_splits_of_a_dataset_are_apart(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"text": "a row to {split}"}}\n')
    options = TextOptions(dataset_name=str(tmp_path), dataset_test_split="test")
    assert documents(train_sources(options)[0][1]) == ["a row to train"]
    held_out = eval_source(options)
    assert held_out is not None
    assert documents(held_out) == ["a row to test"]
    with pytest.raises(DataError, match="split 'nowhere', cannot be loaded"):
        documents(source(dataset_name=str(tmp_path), dataset_train_split="nowhere"))


def test_a_changed_dataset_folder_is_read_again(tmp_path: Path) -> None:
    for text in ("before", "after all"):
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "{text}"}}\n')
        assert documents(source(dataset_name=str(tmp_path))) == [text]


def test_a_folder_that_save_to_disk_wrote_is_read_stored_and_streamed(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(3000)]
    rows = datasets.Dataset.from_dict({"text": texts, "n": list(range(3000))})
    rows.save_to_disk(tmp_path / "one")
    held_out = datasets.Dataset.from_dict({"text": ["held out"], "n": [0]})
    datasets.DatasetDict(train=rows, test=held_out).save_to_disk(tmp_path / "both")
    for streamed in (False, True):
        assert documents(source(dataset_name=str(tmp_path / "one")), streamed=streamed) == texts
        options = TextOptions(dataset_name=str(tmp_path / "both"), dataset_test_split="test")
        assert documents(train_sources(options)[0][1], streamed=streamed) == texts
        evaluated = eval_source(options)
        assert evaluated is not None
        assert documents(evaluated, streamed=streamed) == ["held out"]
        for name, split in (("one", "test"), ("both", "validation")):
            with pytest.raises(DataError, match=f"no split '{split}' there; its splits: train"):
                documents(source(dataset_name=str(tmp_path / name), dataset_train_split=split), streamed=streamed)
        with pytest.raises(DataError, match="saves no configurations"):
            documents(source(dataset_name=str(tmp_path / "one"), dataset_config="en"), streamed=streamed)
        with pytest.raises(DataError, match=r"'body' is not in .*; its columns: text, n"):
            documents(source(dataset_name=str(tmp_path / "one"), text_column="body"), streamed=streamed)
    shards = source(dataset_name=str(tmp_path / "one")).streamed_shards(True)
    assert len(shards) >= 8
    for shard in (shards[0], shards[-1]):
        chunks = list(shard.chunks())
        assert list(shard.chunks(chunks[2].next)) == chunks[3:]


def test_rows_to_finetune_on_are_read_from_a_folder_that_save_to_disk_wrote(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b"}]
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "rows")
    found = read_rows(RowOptions(dataset_name=str(tmp_path / "rows")))
    assert [placed.row for placed in found] == rows
    with pytest.raises(DataError, match="no split 'test' there; its splits: train"):
        next(iter(read_rows(RowOptions(dataset_name=str(tmp_path / "rows"), dataset_train_split="test"))))


# --- options


def test_options_ask_for_one_source() -> None:
    for given in ({}, {"text_files": ["a"], "dataset_name": "b"}, {"text_files": ["a"], "mixture": ["1:b"]}):
        with pytest.raises(UsageError, match="exactly one of text_files, token_files, dataset_name and mixture"):
            TextOptions(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_fraction": 1.0}, "eval_fraction must be above 0 and below 1, got 1"),
        ({"eval_fraction": 0.0}, "eval_fraction must be above 0 and below 1, got 0"),
        ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
        ({"eval_max_tokens": 0}, "eval_max_tokens must be at least 1, got 0"),
        ({"document_separator": ""}, "document_separator must not be empty"),
        ({"dataset_test_split": "test"}, "dataset_test_split is for dataset_name"),
        ({"streaming": True}, "streaming needs eval_files or dataset_test_split"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    TextOptions(text_files=["a"])
    with pytest.raises(UsageError, match=message):
        TextOptions(text_files=["a"], **options)


def test_options_of_a_dataset_that_cannot_be_meant_are_refused() -> None:
    TextOptions(dataset_name="d", dataset_test_split="test")
    with pytest.raises(UsageError, match=r"eval_files=.* and dataset_test_split=test: give one of them"):
        TextOptions(dataset_name="d", dataset_test_split="test", eval_files=["a"])
    with pytest.raises(UsageError, match="document_separator is for text_files"):
        TextOptions(dataset_name="d", document_separator="\n")


def test_a_mixture_names_sources_with_weights(tmp_path: Path) -> None:
    write(tmp_path, a="one", b="two", c="three")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_text('{"text": "row"}\n')
    options = TextOptions(mixture=[f"0.7:{tmp_path}/[ab].txt", f"3:{tmp_path}/c.txt", f"1e-1:dataset:{tmp_path}/set"])
    found = train_sources(options)
    assert [weight for weight, _ in found] == [0.7, 3.0, 0.1]
    assert [documents(each) for _, each in found] == [["one", "two"], ["three"], ["row"]]
    assert [each.name for _, each in found] == [f"{tmp_path}/[ab].txt", f"{tmp_path}/c.txt", f"{tmp_path}/set"]


@pytest.mark.parametrize("entry", ["a.txt", ":a.txt", "1:", "0:a", "-1:a", "nan:a", "inf:a", "1e999:a", "x:a", ""])
def test_a_mixture_without_a_weight_above_zero_is_refused(entry: str) -> None:
    with pytest.raises(UsageError, match=r"give WEIGHT:FILES, such as 0.3:books/\*.txt, the weight above 0"):
        TextOptions(mixture=["1:b.txt", entry])


def test_units_of_a_source_are_the_same_streamed(tmp_path: Path) -> None:
    write(tmp_path, a="one two\n" * 30_000, b="three")
    found = source(text_files=[str(tmp_path / "*.txt")])

    def text(shards: Iterable[Any]) -> Iterator[tuple[str, bool]]:
        waiting = ""
        for shard in shards:
            for chunk in shard.chunks():
                waiting += chunk.text
                if chunk.ends_document:
                    yield waiting, True
                    waiting = ""
        yield waiting, False

    expected = [("one two\n" * 30_000, True), ("three", True), ("", False)]
    assert list(text(found.shards(True))) == list(text(found.streamed_shards(True))) == expected
