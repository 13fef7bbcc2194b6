"""Reading and tokenising documents."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from gpt_kit_hf.corpus import EncodingOptions, choose_encoding, prepare_corpus
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.pretraining_data import stream_of
from gpt_kit_hf.text_sources import TextOptions, find_files, load_documents, load_text_files, tokenize_documents
from gpt_kit_hf.tokenization import END_OF_TEXT, get_encoding


def write(folder: Path, **texts: str | bytes) -> None:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)


def test_files_become_documents_exactly_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, a="one\r\ntwo\n", b="\ufeffthree", c="", d="\u00e9\U0001f600")
    rows = load_text_files([str(tmp_path / "*.txt")])
    assert rows["text"][:] == ["one\r\ntwo\n", "three", "\u00e9\U0001f600"]


def test_a_separator_ends_documents_inside_a_file(tmp_path: Path) -> None:
    write(tmp_path, a=f"one{END_OF_TEXT}two{END_OF_TEXT}\n{END_OF_TEXT}three")
    rows = load_text_files([str(tmp_path / "a.txt")], END_OF_TEXT)
    assert rows["text"][:] == ["one", "two", "three"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, a="before")
    assert load_text_files([str(tmp_path / "a.txt")])["text"][:] == ["before"]
    write(tmp_path, a="afterwards")
    assert load_text_files([str(tmp_path / "a.txt")])["text"][:] == ["afterwards"]


def test_a_file_of_the_same_name_size_and_time_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("one", "aaaa"), ("two", "bbbb")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, d=text)
        os.utime(tmp_path / name / "d.txt", (0, 0))
        monkeypatch.chdir(tmp_path / name)
        assert load_text_files(["d.txt"])["text"][:] == [text]


def test_patterns_name_each_file_once_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, b="b", a="a")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", c="c")
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt")])
    assert [file.name for file in found] == ["b.txt", "a.txt", "c.txt"]


def test_the_standard_library_is_text_that_is_always_there() -> None:
    files = find_files(["python-stdlib"])
    assert len(files) > 300
    assert "argparse.py" in {file.name for file in files}
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)


@pytest.mark.parametrize(
    ("content", "pattern", "message"),
    [
        (None, "missing.txt", "no such file"),
        (b"", "a.txt", "empty, there is no text"),
        (b" \n\t\n", "a.txt", "only white space, there is no text"),
        (b"fine\nthen \xff\n", "a.txt", r"a\.txt:2: not UTF-8 text \(byte 0xff at offset 10\)"),
        ("x", "", "is a folder: name its files"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes | str | None, pattern: str, message: str
) -> None:
    if content is not None:
        write(tmp_path, a=content)
    with pytest.raises(DataError, match=message):
        load_text_files([str(tmp_path / pattern) if pattern else str(tmp_path)])


@pytest.mark.parametrize("num_proc", [1, 2])
def test_tokens_are_those_of_the_encoding_with_an_end_after_each_document(num_proc: int) -> None:
    encoding = get_encoding("bytes")
    texts = [f"document {i} \u00e9 {END_OF_TEXT}" for i in range(150)]
    rows = tokenize_documents(datasets.Dataset.from_dict({"text": texts}), encoding, num_proc)
    end = encoding.encode_single_token(END_OF_TEXT)
    # The marker spelled in a text is text, not an end.
    expected = [[*text.encode(), end] for text in texts]
    assert rows["input_ids"][:] == expected
    assert rows.data.column("input_ids").type.value_type == "uint16"
    stream = stream_of(rows)
    np.testing.assert_array_equal(stream.read(0, len(stream)), np.concatenate(expected))
    np.testing.assert_array_equal(stream.document_starts, np.cumsum([0, *map(len, expected)])[:-1])


def test_the_same_text_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="some text to be stored\n" * 5)
    documents = load_text_files([str(tmp_path / "a.txt")])
    first = tokenize_documents(documents, get_encoding("bytes"))
    monkeypatch.setattr("gpt_kit_hf.text_sources._tokenize_rows", lambda *_, **__: pytest.fail("tokenised again"))
    again = tokenize_documents(load_text_files([str(tmp_path / "a.txt")]), get_encoding("bytes"))
    assert again["input_ids"][:] == first["input_ids"][:]


def test_a_dataset_folder_is_read_by_its_text_column(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.mkdir()
    (body / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    default = load_documents(TextOptions(dataset_name=str(tmp_path / "named")))
    assert default["text"][:] == ["one", None]
    with pytest.raises(DataError, match="row 1 of the dataset must hold text, got None"):
        tokenize_documents(default, get_encoding("bytes"))
    rows = load_documents(TextOptions(dataset_name=str(body), text_column="body"))
    assert rows["text"][:] == ["one", "two"]
    with pytest.raises(DataError, match=r"text_column 'text' is not in .*; its columns: body"):
        load_documents(TextOptions(dataset_name=str(body)))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_documents(TextOptions(dataset_name=str(tmp_path / "nothing")))


def test_options_ask_for_one_source() -> None:
    with pytest.raises(UsageError, match="exactly one of text_files and dataset_name"):
        TextOptions()
    with pytest.raises(UsageError, match="eval_fraction must lie between 0 and 1, got 1"):
        TextOptions(text_files=["a"], eval_fraction=1.0)
    with pytest.raises(UsageError, match="unknown encoding 'byte'; did you mean 'bytes'"):
        EncodingOptions(encoding="byte")


def test_a_corpus_is_split_and_held_out_files_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, a="abcdefghij" * 30, held="0123456789")
    options = TextOptions(text_files=[str(tmp_path / "a.txt")], eval_files=[str(tmp_path / "held.txt")])
    encoding = choose_encoding(options, EncodingOptions(encoding="bytes"))
    corpus = prepare_corpus(options, encoding, seed=0)
    assert bytes(corpus.held_out.read(0, 10).tolist()) == b"0123456789"
    assert len(corpus.train) == 301
    cut = prepare_corpus(TextOptions(text_files=[str(tmp_path / "a.txt")]), encoding, seed=0)
    assert (len(cut.train), len(cut.held_out)) == (271, 30)
    assert cut.fingerprint != corpus.fingerprint
    trained = choose_encoding(options, EncodingOptions(vocab_size=270))
    assert 257 < trained.n_vocab <= 270
    assert prepare_corpus(options, trained, seed=0).fingerprint != corpus.fingerprint
