"""What is said of a text before training, against counts and lines by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from gpt_kit_hf.data.text.corpus import prepare_corpus, prepare_text
from gpt_kit_hf.data.text.documents import MARKS_IN_TEXT, READ, left_out
from gpt_kit_hf.data.text.report import Reading, describe_documents, describe_stream
from gpt_kit_hf.data.text.sources import train_sources
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, get_encoding

BYTES = get_encoding("bytes")


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(**options: Any) -> list[str]:
    text = TextOptions(**options)
    return prepare_text(text, BYTES).reading.lines(text)


def stream_of(*documents: str) -> TokenStream:
    arrays = [np.array([*document.encode(), 256], np.uint16) for document in documents]
    return TokenStream(arrays, np.cumsum([0, *map(len, arrays)])[:-1])


def test_lengths_and_three_documents_are_shown() -> None:
    documents = ["x" * length for length in (1, 2, 3, 4, 5, 6, 7, 8, 9, 100)]
    documents[0], documents[5] = "a\x1b[2J\n", "\n  first\nsecond\n\u5317 last \n\n"
    found = describe_documents(stream_of(*documents), BYTES)
    # The sizes are 2, 3, 4, 5, 6, 7, 8, 9, 28, 100, in order, for nearest ranks 0, 4.5, 8.1 and 9.
    sizes = sorted(len(document.encode()) for document in documents)
    assert found[0] == (
        f"lengths  tokens per document: min {sizes[0]}, median {sizes[4]}, 90% up to {sizes[8]}, max {sizes[9]}"
    )
    assert found[1:] == [
        r"shown    document 1: 'a\x1b[2J'",
        "shown    document 6: 'first' to '\u5317 last'",
        f"shown    document 10: '{'x' * 60}…' to '…{'x' * 60}'",
    ]
    assert describe_documents(stream_of("one"), BYTES) == ["shown    document 1: 'one'"]


def test_a_stream_is_described_by_its_first_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "ab" * (1 + n % 3)}) + "\n" for n in range(9)))
    (source,) = [source for _, source in train_sources(TextOptions(text_files=[str(tmp_path / "a.jsonl")]))]
    found = describe_stream(source.streamed_shards(True), BYTES)
    assert found == [
        "lengths  tokens per document, of 9 documents: min 2, median 4, 90% up to 6, max 6",
        "shown    shard 1: 'ab'",
    ]


def test_a_stream_of_which_everything_is_left_out_is_described_by_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    (_, source), *_ = train_sources(TextOptions(text_files=[str(tmp_path / "a.txt")], on_bad_text="skip"))
    assert describe_stream(source.streamed_shards(True), BYTES) == []


def test_a_separator_that_stands_nowhere_in_a_stream_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\n")
    (_, source), *_ = train_sources(TextOptions(text_files=[str(tmp_path / "a.txt")], document_separator="\n\n"))
    assert describe_stream(source.streamed_shards(True), BYTES, "\n\n")[-1] == (
        r"warning  document_separator '\n\n' stands nowhere in the text: a file is one document; "
        r"the text has '\r\n\r\n' 1 times"
    )


def test_a_warning_says_which_text_it_is_about() -> None:
    reading = Reading(tally=Counter(), used=0, warnings=("a file is one document",))
    options = TextOptions(text_files=["a.txt"])
    assert reading.lines(options) == ["warning  a file is one document"]
    assert reading.lines(options, "eval text") == ["warning  eval text: a file is one document"]


def test_nothing_is_said_of_a_text_of_good_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n" * 30)
    assert lines(text_files=[str(tmp_path / "a.txt")]) == []


def test_marks_and_bad_text_are_counted_in_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one\n{EOS_TOKEN}\ntwo {EOS_TOKEN} two\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": null}\n{"text": null}\n{"text": "\xff\xff"}\n')
    files = [str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")]
    by_mark = f"(--document_separator '{EOS_TOKEN}' ends a document at each)"
    assert lines(text_files=files, on_bad_text="skip") == [
        "left out 3 of 6 documents of the text: 1 not UTF-8, 2 null",
        f"eos      {EOS_TOKEN} in the text: 1 at line ends, which end documents; "
        f"1 within lines, read as text {by_mark}",
    ]
    assert lines(text_files=files, on_bad_text="replace", eos_in_text="keep") == [
        "left out 2 of 5 documents of the text: 2 null",
        "replaced characters of the text by U+FFFD: 2 not UTF-8",
        f"eos      {EOS_TOKEN} in the text: 2, read as text {by_mark}",
    ]


def test_the_counts_are_those_of_all_sources_and_of_the_evaluation_text(tmp_path: Path) -> None:
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some text"}\n{"text": null}\n' * 20)
    text = TextOptions(
        mixture=[f"1:{tmp_path}/a.jsonl", f"1:{tmp_path}/b.jsonl"],
        eval_files=[f"{tmp_path}/held.jsonl"],
        on_bad_text="skip",
        num_proc=3,
    )
    made = prepare_corpus(text, BYTES, seed=0)
    assert made.documents == 40
    assert made.reading.facts() == {
        "documents_read": 80,
        "documents_used": 40,
        "left_out": {"null": 40},
        "replaced_characters": {},
        "eos_in_text": {"ended_documents": 0, "read_as_text": 0},
    }
    assert made.eval_reading is not None
    assert made.eval_reading.facts()["left_out"] == {"null": 20}


GOOD = ['{"text": "good"}', '{"text": "one<|endoftext|>"}', '{"text": "a <|endoftext|> b"}', '{"text": ""}']
BAD = {
    "null": b'{"text": null}',
    "not a string": b'{"text": ["a"]}',
    "half a surrogate": b'{"text": "\\udc00"}',
    "not UTF-8": b'{"text": "\xe9"}',
    "not a JSON row": b'{"text": "cut',
    "without the column": b'{"words": "a"}',
}


@pytest.mark.parametrize("policy", ["skip", "replace", "stop"])
@pytest.mark.parametrize("seed", range(4))
def test_documents_read_are_those_used_and_those_left_out(tmp_path: Path, policy: Any, seed: int) -> None:
    rng = random.Random(seed)
    kinds = [rng.choice([*BAD, "good", "good", "good"]) for _ in range(200)]
    rows = [BAD[kind] if kind in BAD else rng.choice(GOOD).encode() for kind in kinds]
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n".join(rows[number::4]) + b"\n")
    texts = [rng.choice([b"good ", b"b\xe4d "]) * rng.randint(1, 9) for _ in range(40)]
    (tmp_path / "a.txt").write_bytes(b"\n--\n".join(texts))
    text = TextOptions(
        text_files=[f"{tmp_path}/*.*"], document_separator="\\n--\\n", on_bad_text=policy, num_proc=rng.randint(1, 4)
    )
    if policy == "stop":
        with pytest.raises(DataError, match="--on_bad_text skip leaves such text out"):
            prepare_text(text, BYTES)
        return
    mended = ("not UTF-8", "half a surrogate") if policy == "replace" else ()
    gone = Counter(kind for kind in kinds if kind in BAD and kind not in mended)
    bad_texts = sum(b"\xe4" in each for each in texts)
    if policy == "skip":
        gone["not UTF-8"] += bad_texts
    facts = prepare_text(text, BYTES).reading.facts()
    assert facts["documents_read"] == 240 == facts["documents_used"] + sum(gone.values())
    assert facts["left_out"] == {kind: n for kind, n in sorted(gone.items()) if n}
    counts = {"half a surrogate": kinds.count("half a surrogate"), "not UTF-8": kinds.count("not UTF-8")}
    counts["not UTF-8"] += sum(each.count(b"\xe4") for each in texts)
    assert facts["replaced_characters"] == (counts if mended else {})


def test_counts_that_do_not_add_up_are_not_reported() -> None:
    Reading(tally=Counter({READ: 3, left_out("null"): 1, MARKS_IN_TEXT: 9}), used=2).facts()
    with pytest.raises(AssertionError):
        Reading(tally=Counter({READ: 3, left_out("null"): 1}), used=3).facts()


@pytest.mark.parametrize("null", [0, 2])
def test_a_text_of_empty_documents_is_refused(tmp_path: Path, null: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 7 + '{"text": null}\n' * null)
    (tmp_path / "a.csv").write_text("text,id\n" + ",1\n" * 7)
    counted = rf"all documents are empty \(7\) or were left out \({f'{null} null' if null else 0}\)"
    with pytest.raises(DataError, match=f"{counted}, there is no text to train on"):
        lines(text_files=[str(tmp_path / "a.jsonl")], on_bad_text="skip")
    with pytest.raises(DataError, match=r"all documents are empty \(7\)"):
        lines(text_files=[str(tmp_path / "a.csv")])


def test_a_text_of_bad_documents_alone_is_refused_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 7)
    with pytest.raises(DataError, match=r"all documents were left out \(7 null\), there is no text to train on"):
        lines(text_files=[str(tmp_path / "a.jsonl")], on_bad_text="skip")


# --- separators


@pytest.mark.parametrize(
    ("content", "separator", "warning"),
    [
        ("one\r\n\r\ntwo\r\n\r\n", "\\n\\n", r"'\n\n' stands nowhere .*; the text has '\r\n\r\n' 2 times"),
        ("one\n\ntwo", "\\\\n\\\\n", r"'\\n\\n' stands nowhere .*; the text has '\n\n' 1 times"),
        (f"one{EOS_TOKEN}two", "<|end|>", rf"'<|end|>' stands nowhere .*; the text has '{EOS_TOKEN}' 1 times"),
        ("one\nend of\ntwo", "END OF", r"'END OF' stands nowhere .*; the text has 'end of' 1 times"),
        ("one two", "---", r"'---' stands nowhere in the text: a file is one document"),
    ],
)
def test_a_separator_that_stands_nowhere_is_a_warning_with_a_hint(
    tmp_path: Path, content: str, separator: str, warning: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    start, _, rest = warning.partition(".*")
    for _ in range(2):  # read, and from the cache
        (found,) = [
            line for line in lines(text_files=[str(tmp_path / "a.txt")], document_separator=separator) if "war" in line
        ]
        assert found.startswith(f"warning  document_separator {start}")
        assert rest in found


def test_files_with_other_line_ends_among_those_with_a_separator_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo")
    (tmp_path / "b.txt").write_bytes(b"one\r\n\r\ntwo\r\n\r\nthree")
    (found,) = lines(text_files=[f"{tmp_path}/*.txt"], document_separator="\\n\\n")
    assert "where lines end in CRLF, 2 times" in found


def test_rows_have_no_separator_to_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    assert lines(text_files=[str(tmp_path / "a.jsonl")], document_separator="\\n\\n") == []
