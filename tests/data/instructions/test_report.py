from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from tiny_model import byte_tokenizer
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from gpt_kit_hf.data.instructions.batches import PackedRows, PaddedRows
from gpt_kit_hf.data.instructions.formats import format_alpaca
from gpt_kit_hf.data.instructions.reader import SkippedRows, read_rows
from gpt_kit_hf.data.instructions.report import inspect_batches, report_of, report_of_examples
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, encode_rows
from gpt_kit_hf.errors import DataError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import RowOptions, SupervisionOptions
from gpt_kit_hf.tokenization.encodings import get_encoding, save_tokenizer

END = 256
BYTES = get_encoding("bytes")
ROW = {"prompt": "Q:", "completion": " A"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encode(rows: list[Any], **options: Any) -> SupervisedRows:
    return encode_rows(rows, BYTES, SupervisionOptions(**{"max_length": 100, **options}))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_counts_equal_independent_ones_on_real_rows(
    name: str, shared_data: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    encoding = BYTES if name == "bytes" else request.getfixturevalue("gpt2_encoding")
    save_tokenizer(encoding, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    file = shared_data / "instruction-data.json"
    max_length = {"bytes": 420, "gpt2": 90}[name]
    options = SupervisionOptions(max_length=max_length, truncation="drop")
    rows = encode_rows(read_rows(RowOptions(rows=[str(file)])), exported, options)
    report = report_of(rows, exported, batch_size=16)

    # The same, from the file and tiktoken alone.
    data = json.loads(file.read_text(encoding="utf-8"))
    sizes = [
        (len(encoding.encode_ordinary(format_alpaca(row))), len(encoding.encode_ordinary(row["output"])) + 1)
        for row in data
    ]
    used = [(prompt, answer) for prompt, answer in sizes if prompt + answer - 1 <= max_length]
    assert 0 < len(used) < 1100  # or nothing is dropped, and the counts of that say nothing
    assert (report.rows_read, report.rows_used) == (1100, len(used))
    assert {kind: rows.rows for kind, rows in report.dropped.items()} == {"longer than max_length": 1100 - len(used)}
    assert report.skipped == {}
    assert report.tokens == sum(map(sum, used))
    assert report.tokens_trained == sum(answer for _, answer in used)
    assert report.ends_trained == len(used)
    assert report.share_trained == pytest.approx(report.tokens_trained / report.tokens)
    assert (report.rows_without_label, report.rows_end_untrained, report.rows_truncated) == (0, 0, 0)
    read = [prompt + answer - 1 for prompt, answer in used]
    batches = [read[first : first + 16] for first in range(0, len(read), 16)]
    assert report.padding == sum(max(batch) - n for batch in batches for n in batch)
    assert report.padding_packed == len(PackedRows(rows)) * max_length - sum(read)
    assert report.padding_saved == report.padding - report.padding_packed
    for bound, n_rows in report.length_histogram:
        assert n_rows == sum(bound // 2 < length <= bound for length in read)
    assert sum(n_rows for _, n_rows in report.length_histogram) == len(used)
    assert report.findings() == []
    report.check()


def test_all_labels_masked_is_caught() -> None:
    examples = [([*b"Q: A", END], [False] * 5)] * 3
    report = report_of_examples(examples, BYTES, END)
    assert (report.rows_without_label, report.tokens_trained) == (3, 0)
    assert report.findings() == ["3 of 3 rows train nothing: all their labels are masked"]
    with pytest.raises(DataError, match="nothing would be trained: all labels of 3 rows are masked"):
        report.check()


def test_eos_masked_as_padding_is_caught(tokenizer: PreTrainedTokenizerBase) -> None:
    # The collator of transformers masks every label that equals the padding's id.
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    collate = DataCollatorForLanguageModeling(padded, mlm=False)
    batch = collate([{"input_ids": [*b"Q: A", END]}, {"input_ids": [*b"Q: ABC", END]}])
    report = inspect_batches([(batch["input_ids"], batch["labels"])], BYTES, END)
    assert (report.rows_end_untrained, report.rows_end_masked, report.ends_trained) == (2, 2, 0)
    assert report.tokens_trained == 4 + 6 - 2 + 2
    assert "2 of 2 rows mask the EOS after an answer, as happens if padding is EOS" in report.findings()
    with pytest.raises(DataError, match="no EOS would be trained in 2 rows"):
        report.check()


def examples_in(batch: Batch) -> Iterator[tuple[Any, Any]]:
    """The documents of a batch with shifted targets, as (ids, trained) pairs, padding with them.

    A document ends where its positions restart, or with its row. Its last target, if trained, is its last id.
    """
    for index in range(len(batch.input_ids)):
        ids, targets = batch.input_ids[index].numpy(), batch.targets[index].numpy()
        positions = np.arange(len(ids)) if batch.position_ids is None else batch.position_ids[index].numpy()
        restarts = np.flatnonzero(positions[1:] == 0) + 1
        for piece_ids, piece_targets in zip(np.split(ids, restarts), np.split(targets, restarts), strict=True):
            trained = np.concatenate(([False], piece_targets != -100))
            if trained[-1]:
                yield np.append(piece_ids, piece_targets[-1]), trained
            else:
                yield piece_ids, trained[:-1]


def test_our_batches_train_eos_although_padding_is_eos() -> None:
    rows = encode([ROW, {**ROW, "completion": " ABCDE"}, {**ROW, "prompt": "Q<|endoftext|>:"}])
    expected = report_of(rows, BYTES)
    for dataset in (PackedRows(rows), PaddedRows(rows)):
        batch: Any = dataset.collate([dataset[index] for index in range(len(dataset))])  # type: ignore[arg-type]
        report = report_of_examples(examples_in(batch), BYTES, END)
        assert report.tokens_trained == expected.tokens_trained == int(rows.trained.sum())
        assert report.ends_trained == expected.ends_trained == 3
        # A packed sequence's padding is a document without a label, a padded row's belongs to the row.
        assert report.rows_without_label == (1 if isinstance(dataset, PackedRows) else 0)
        assert report.rows_end_untrained == 0


def test_answers_cut_off_are_caught() -> None:
    whole = ([*b"Q: A", END], [False] * 2 + [True] * 3)
    cut = ([*b"Q: A"], [False] * 2 + [True] * 2)
    report = report_of_examples([whole, cut, cut], BYTES, END)
    assert (report.rows_end_untrained, report.rows_cut_off, report.rows_end_masked) == (2, 2, 0)
    assert report.findings() == ["2 of 3 rows stop inside an answer, without EOS: cut off"]
    report.check()  # EOS is trained in one row
    with pytest.raises(DataError, match="no EOS"):
        report_of_examples([cut], BYTES, END).check()


def test_an_answer_that_stops_being_trained_is_caught() -> None:
    half = ([*b"Q: ABC", END], [False, False, True, True, False, False, False])
    report = report_of_examples([half], BYTES, END)
    assert (report.rows_end_untrained, report.rows_cut_off, report.rows_end_masked) == (1, 0, 0)
    assert report.findings() == ["1 of 1 rows have an answer that goes on, untrained, without EOS"]


def test_each_turn_of_a_row_needs_eos() -> None:
    ids = [*b"Q:A", END, *b"Q:B", END]
    good = [False, False, True, True] * 2
    missing = [False, False, True, False, False, False, True, True]
    report = report_of_examples([(ids, good), (ids, missing)], BYTES, END)
    assert (report.rows_end_untrained, report.rows_end_masked, report.ends_trained) == (1, 1, 3)


def test_a_template_without_generation_marks_is_caught(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = bare.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    report = report_of_examples([(rendered["input_ids"], np.array(rendered["assistant_masks"]) == 1)], bare, END)
    with pytest.raises(DataError, match=r"a chat template needs \{% generation %\} marks"):
        report.check()


def test_a_prompt_trained_by_accident_is_caught() -> None:
    everything = report_of(encode([ROW] * 4, train_on="everything"), BYTES)
    assert (everything.rows_prompt_trained, everything.findings()) == (4, [])  # it was asked for
    examples = [([*b"Q: A", END], trained) for trained in ([True] * 5, [False] + [True] * 4, [False] * 2 + [True] * 3)]
    report = report_of_examples(examples, BYTES, END)
    assert report.rows_prompt_trained == 2
    assert report.findings() == ["2 of 3 rows train from their first token on: the prompt is trained, too"]


def test_labels_that_are_shifted_already_are_caught() -> None:
    ids = torch.tensor([[*b"Q: A", END]])
    shifted = torch.tensor([[*b": A", END, -100]])
    with pytest.raises(DataError, match="batch 0: a label is not the id at its position"):
        inspect_batches([(ids, shifted)], BYTES, END)


def test_uneven_examples_are_refused() -> None:
    with pytest.raises(DataError, match="row 1: ids"):
        report_of_examples([([1], [True]), ([1, 2], [True])], BYTES, END)


def test_counts_of_random_marks_equal_plain_ones() -> None:
    draw = np.random.default_rng(3)
    examples = []
    for _ in range(300):
        length = int(draw.integers(1, 12))
        examples.append((draw.choice([97, 98, END], length), draw.random(length) < draw.choice([0.0, 0.3, 0.7, 1.0])))
    report = report_of_examples(examples, BYTES, END, n_examples=0)
    plain = {"open": 0, "masked": 0, "cut": 0, "without": 0, "prompt": 0}
    for ids, trained in examples:
        n = len(ids)
        lasts = [i for i in range(n) if trained[i] and (i == n - 1 or not trained[i + 1])]
        opened = [i for i in lasts if ids[i] != END]
        masked = [i for i in opened if i + 1 < n and ids[i + 1] == END]
        plain["open"] += bool(opened)
        plain["masked"] += bool(masked)
        plain["cut"] += bool(opened) and not masked and opened[-1] == n - 1
        plain["without"] += not lasts
        plain["prompt"] += any(trained[:2])
    assert report.rows_end_untrained == plain["open"] > 0
    assert report.rows_end_masked == plain["masked"] > 0
    assert report.rows_cut_off == plain["cut"] > 0
    assert report.rows_without_label == plain["without"] > 0
    assert report.rows_prompt_trained == plain["prompt"] > 0
    assert report.tokens_trained == sum(int(trained.sum()) for _, trained in examples)


def mixed_rows(tmp_path: Path) -> SupervisedRows:
    lines = [json.dumps(ROW), "{", '{"prompt": "a"}', '{"prompt": null, "completion": "b"}', '{"prompt": "c"}']
    lines += [json.dumps({"prompt": "x" * 30, "completion": "y"}), json.dumps({**ROW, "completion": "z" * 30})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    skipped = SkippedRows()
    read = read_rows(RowOptions(rows=[str(tmp_path / "rows.jsonl")], on_bad_row="skip"), skipped)
    options = SupervisionOptions(max_length=20, truncation="truncate_prompt")
    return encode_rows(read, BYTES, options, on_bad_row="skip", skipped=skipped)


def test_what_was_left_out_is_counted_and_placed(tmp_path: Path) -> None:
    report = report_of(mixed_rows(tmp_path), BYTES)
    assert (report.rows_read, report.rows_used, report.rows_truncated) == (7, 2, 1)
    assert {kind: left.rows for kind, left in report.skipped.items()} == {
        "missing key": 2,
        "broken JSON": 1,
        "null": 1,
    }
    assert {kind: left.rows for kind, left in report.dropped.items()} == {"longer than max_length": 1}
    name = tmp_path / "rows.jsonl"
    assert report.skipped["missing key"].first == tuple(
        f"{name}:{n}: 'completion' is missing; its keys: 'prompt'" for n in (3, 5)
    )
    assert report.skipped["broken JSON"].first[0].startswith(f"{name}:2:2: broken JSON")
    assert report.dropped["longer than max_length"].first[0].startswith(f"{name}:7: the answers alone need 31")
    text = report.text()
    for expected in ("7 read, 2 used, 4 skipped, 1 dropped", "2 skipped: missing key", f"{name}:3: ", f"{name}:7: "):
        assert expected in text
    assert "1 rows lost the beginning of their prompt" in text


def test_the_report_is_json(tmp_path: Path) -> None:
    report = report_of(mixed_rows(tmp_path), BYTES)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["skipped"]["missing key"]["rows"] == 2
    assert values["tokens_trained"] == report.tokens_trained
    assert values["padding_saved"] == report.padding_saved
    assert values["examples"][0] == [{"text": "Q:", "trained": False}, {"text": " A<|endoftext|>", "trained": True}]


def test_the_text_highlights_what_is_trained() -> None:
    report = report_of(encode([ROW]), BYTES)
    assert "Q:⟦ A<|endoftext|>⟧" in report.text()
    assert "\x1b" not in report.text()
    assert "\x1b[2mQ:\x1b[0m\x1b[32m A<|endoftext|>\x1b[0m" in report.text(color=True)
    assert "tokens    5, 3 trained (60.0%), 1 of them EOS" in report.text()
    assert "<=       4         1  ####" in report.text()


def test_text_of_rows_cannot_control_the_terminal() -> None:
    steering = {"prompt": "\x1b[2J\u202e" + "p" * 2000, "completion": "a\rb\x07\u200b日"}
    text = report_of(encode([steering], max_length=4000), BYTES).text()
    assert not {"\x1b", "\r", "\x07", "\u202e", "\u200b"} & set(text)
    assert r"\x1b[2J\u202e" in text
    assert r"a\rb\x07\u200b日" in text
    assert len(text) < 1500


def test_no_rows_at_all_are_refused() -> None:
    report = report_of_examples([], BYTES, END)
    assert report.share_trained == 0
    assert "0 read" in report.text()
    with pytest.raises(DataError, match="no row to train on"):
        report.check()


def test_rows_beyond_a_sequence_leave_the_padding_of_packing_unknown() -> None:
    report = report_of_examples([([1] * 9, [True] * 9)], BYTES, END, max_length=7)
    assert (report.padding_packed, report.padding_saved) == (None, None)
    assert report_of_examples([([1] * 9, [True] * 9)], BYTES, END, max_length=8).padding_packed == 0


def test_gpt2_shows_text_of_any_language(gpt2_encoding: tiktoken.Encoding) -> None:
    rows = encode_rows([{"prompt": "日本", "completion": "語"}], gpt2_encoding, SupervisionOptions())
    assert "日本⟦語<|endoftext|>⟧" in report_of(rows, gpt2_encoding).text()


def test_keys_that_are_not_read_and_thinking_left_out_are_listed_once(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi", "mood": "good"},
        {"role": "assistant", "content": "ho", "thinking": "h"},
    ]
    rows = [{"messages": turns, "id\x1b[2J": 1}, {"messages": turns, "id\x1b[2J": 2, "source": None}]
    encoded = encode_rows(rows, byte_tokenizer(tmp_path), SupervisionOptions())
    for part in (encoded, encoded.split([0.5, 0.5], 0)[0]):  # of the whole input
        report = report_of(part, BYTES)
        lines = report.text().splitlines()
        assert "  keys not read: messages[].mood (2), id\\x1b[2J (2)" in lines
        assert "  thinking left out of 2 answers; --thinking train includes it" in lines
        assert report.to_dict()["unread_keys"] == {"messages[].mood": 2, "id\x1b[2J": 2}
    plain = report_of(encode_rows([ROW], BYTES, SupervisionOptions()), BYTES).text()
    assert "not read" not in plain
    assert "thinking" not in plain
