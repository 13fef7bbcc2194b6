from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from tiny_model import byte_tokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gpt_kit_hf import GPTModel, create_model_config
from gpt_kit_hf.data.instructions.batches import PackedRows, PaddedRows
from gpt_kit_hf.data.instructions.dataset import InstructionDataset
from gpt_kit_hf.data.instructions.formats import format_alpaca
from gpt_kit_hf.data.instructions.reader import SkippedRows, read_rows
from gpt_kit_hf.data.instructions.rows import PlacedRow
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, best_fit_decreasing, encode_rows
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.model.losses import Batch, summed_batch_loss
from gpt_kit_hf.options.data import RowOptions, SupervisionOptions
from gpt_kit_hf.tokenization.encodings import get_encoding

END = 256
BYTES = get_encoding("bytes")
ALPACA = {"instruction": "Say x.", "input": "", "output": "x"}
PAIR = {"prompt": "Q:", "completion": " A"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encode(rows: list[Any], tokenizer: Any = BYTES, **options: Any) -> SupervisedRows:
    return encode_rows(rows, tokenizer, SupervisionOptions(**{"max_length": 1000, **options}))


def text_of(ids: Any) -> str:
    return BYTES.decode([int(token) for token in ids])


def trained_text(rows: SupervisedRows, index: int) -> str:
    row = rows[index]
    return text_of(row.input_ids[row.trained])


def test_the_format_of_each_row_is_found_by_its_keys(tokenizer: PreTrainedTokenizerBase) -> None:
    other = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    conversational = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    extra = {**CHAT, "prompt": "hi", "id": 7}
    rows = encode([ALPACA, PAIR, CHAT, other, conversational, extra], tokenizer)
    chat = "### User:\nhi\n\n### Assistant:\nho<|endoftext|>"
    texts = [format_alpaca(ALPACA) + "x<|endoftext|>", "Q: A<|endoftext|>", *[chat] * 4]
    assert [text_of(rows[index].input_ids) for index in range(6)] == texts
    answers = ["x", " A", *["ho"] * 4]
    assert [trained_text(rows, index) for index in range(6)] == [f"{answer}<|endoftext|>" for answer in answers]
    assert [rows[index].place for index in range(6)] == [f"row {index}" for index in range(6)]


def test_everything_trains_all_but_the_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in (ALPACA, PAIR, CHAT):
        rows = encode([row], tokenizer, train_on="everything")
        assert rows.trained.tolist() == [False, *[True] * (len(rows.ids) - 1)]


def test_all_assistant_turns_are_trained_but_those_of_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": role, "content": text} for role, text in zip("uauau", "abcde", strict=True)]
    for turn in turns:
        turn["role"] = {"u": "user", "a": "assistant"}[turn["role"]]
    assert trained_text(encode([{"messages": turns}], tokenizer), 0) == "b<|endoftext|>d<|endoftext|>"
    split = {"prompt": turns[:3], "completion": turns[3:]}
    assert trained_text(encode([split], tokenizer), 0) == "d<|endoftext|>"


def test_eos_spelled_out_in_a_text_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "a<|endoftext|>", "completion": "b<|endoftext|>"}
    expected = [*b"a<|endoftext|>b<|endoftext|>", END]
    for each in (BYTES, tokenizer):
        assert encode([row], each).ids.tolist() == expected


def test_ids_equal_those_of_the_kits_dataset(shared_data: Path, gpt2_encoding: tiktoken.Encoding) -> None:
    data = json.loads((shared_data / "instruction-data.json").read_text(encoding="utf-8"))[:200]
    kit = InstructionDataset(data, gpt2_encoding)
    rows = encode(data, gpt2_encoding)
    end = gpt2_encoding.eot_token
    for index, item in enumerate(kit):
        assert rows[index].input_ids.tolist() == [*item.input_ids, end]
        n_answer = len(item.input_ids) - item.prompt_length + 1
        assert rows[index].trained.tolist() == [False] * item.prompt_length + [True] * n_answer


def test_a_format_function_writes_any_row(tokenizer: PreTrainedTokenizerBase) -> None:
    options = SupervisionOptions(format="chat")
    rows = encode_rows([{"q": "1", "a": "2"}], tokenizer, options, lambda row: (row["q"] + "=", row["a"]))
    assert text_of(rows.ids) == "1=2<|endoftext|>"


# Rows that cannot be used, and an excerpt of the message for each. With a chat template, bytes and max_length 1,000.
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no row": (None, "a row is a dict, got None"),
    "text": ("x", "a row is a dict, got 'x'"),
    "list": ([ALPACA], "a row is a dict"),
    "empty": ({}, "its keys: none"),
    "unknown keys": ({"titre": "a", "texte": "b"}, "its keys: 'titre, texte'"),
    "two questions": ({"query": "a", "question": "b", "answer": "c"}, "'query', 'answer' are of several"),
    "two answers": ({"query": "a", "solution": "b", "answer": "c"}, "name the columns by columns"),
    "alpaca and pair": ({**ALPACA, **PAIR}, "'instruction', 'output', 'prompt', 'completion' are of several"),
    "alpaca and chat": ({**ALPACA, **CHAT}, "'output', 'messages' are of several formats"),
    "pair and chat": ({**PAIR, **CHAT}, "of several formats"),
    "two spellings of chat": ({**CHAT, "conversations": [{"from": "gpt", "value": "x"}]}, "of several formats"),
    "halves of two": ({"instruction": "a", "prompt": "b"}, "of several formats"),
    "no output": ({"instruction": "a", "input": ""}, "'output' is missing"),
    "no instruction": ({"output": "a", "input": ""}, "'instruction' is missing"),
    "two missing": ({"instruction": None, "input": "a"}, "'output' is missing; its keys: 'instruction, input'"),
    "an input alone": ({"input": "a", "output": None}, "'instruction' is missing"),
    "null output": ({**ALPACA, "output": None}, "'output' is null"),
    "context of no text": ({"question": "a", "context": {"b": 1}, "answer": "c"}, "'context' is a dict of 1 (dict)"),
    "number for an answer": ({"question": "a", "answer": 1}, "'answer' is 1 (int)"),
    "history of no pairs": ({**ALPACA, "history": ["a"]}, "history[0] is 'a'; it must be [question, answer]"),
    "history of no list": ({**ALPACA, "history": "a"}, "'history' is 'a'; it must be a list"),
    "blank answer in history": ({**ALPACA, "history": [["a", " "]]}, "the answer is blank"),
    "system of a prompt as it is": ({**PAIR, "system": "a"}, "has no place before a prompt"),
    "text alone": ({"text": "a"}, "train_on everything"),
    "text and a prompt": ({"text": "a", "prompt": "b"}, "of several formats"),
    "NaN output": ({**ALPACA, "output": math.nan}, "'output' is NaN"),
    "number for output": ({**ALPACA, "output": 7}, "'output' is 7 (int)"),
    "list for output": ({**ALPACA, "output": ["x"]}, "'output' is a list of 1 (list)"),
    "truth for input": ({**ALPACA, "input": False}, "'input' is False (bool)"),
    "empty output": ({**ALPACA, "output": ""}, "'output' is blank"),
    "blank output": ({**ALPACA, "output": " \n\t"}, "'output' is blank"),
    "blank instruction": ({**ALPACA, "instruction": " "}, "'instruction' is blank"),
    "half a surrogate pair": ({**ALPACA, "output": "a\ud83d"}, "surrogate U+D83D at character 1"),
    "surrogate in the prompt": ({**PAIR, "prompt": "\udc00"}, "surrogate U+DC00"),
    "no completion": ({"prompt": "a"}, "'completion' is missing"),
    "no prompt": ({"completion": "a"}, "'prompt' is missing"),
    "empty completion": ({**PAIR, "completion": ""}, "'completion' is blank"),
    "empty prompt": ({**PAIR, "prompt": ""}, "'prompt' is blank"),
    "null completion": ({**PAIR, "completion": None}, "'completion' is null"),
    "number for prompt": ({**PAIR, "prompt": 1.5}, "'prompt' is 1.5"),
    "messages and a text": ({**PAIR, "prompt": CHAT["messages"]}, "'prompt' is a list of 2"),
    "null messages": ({"messages": None}, "'messages' is null"),
    "text for messages": ({"messages": "hi"}, "'messages' is 'hi'"),
    "object for messages": ({"messages": {"role": "user"}}, "'messages' is a dict"),
    "no messages": ({"messages": []}, "'messages' is an empty list"),
    "text for a message": (
        {"messages": ["hi"]},
        "messages[0]: a message is an object with role and content, got 'hi'",
    ),
    "null message": ({"messages": [None]}, "messages[0]: a message is an object with role and content, got None"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0]: 'role' is missing"),
    "null role": ({"messages": [{"role": None, "content": "x"}]}, "messages[0]: 'role' is null"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0]: 'content' is missing"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, "'content' is null"),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0]: 'text' is missing",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0]: 'content' holds a part of type 'image_url'; only parts of type 'text'",
    ),
    "a part that is no object": ({"messages": [{"role": "user", "content": ["x"]}]}, "holds a part 'x'"),
    "unknown role": (
        {"messages": [{"role": "bot", "content": "x"}, *CHAT["messages"]]},
        "rejects the messages: unknown role bot",
    ),
    "late system": ({"messages": [*CHAT["messages"], {"role": "system", "content": "x"}]}, "must be the first"),
    "no answer": ({"messages": CHAT["messages"][:1]}, "no message of the assistant"),
    "empty answer": ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0]: the answer is blank"),
    "blank answer": ({"messages": [*CHAT["messages"], {"role": "assistant", "content": "\n"}]}, "messages[2]: the"),
    "EOS in a question": (
        {"messages": [{"role": "user", "content": "a<|endoftext|>"}, *CHAT["messages"]]},
        "message 0 holds '<|endoftext|>', a special token",
    ),
    "EOS in an answer": (
        {"messages": [{"role": "assistant", "content": "a<|endoftext|>b"}]},
        "message 0 holds '<|endoftext|>'",
    ),
    "surrogate in a message": ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "surrogate U+D800"),
    "surrogate in a role": ({"messages": [{"role": "\ud800", "content": "x"}]}, "surrogate U+D800"),
    "a tool call without a name": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0]: a tool call is an object with the name of a function",
    ),
    "a tool call of a user": (
        {"messages": [{"role": "user", "content": "x", "function_call": {"name": "f"}}]},
        "messages[0]: a turn of 'user' has tool calls",
    ),
    "arguments that are no JSON": (
        {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}]},
        "the arguments of the tool call 'f' must be JSON of an object",
    ),
    "no answer of weight 1": (
        {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
        "each answer is marked as not trained",
    ),
    "half a weight": ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "'weight' is 0.5"),
    "a text for a mark": ({"messages": [{"role": "assistant", "content": "x", "train": "no"}]}, "'train' is 'no'"),
    "a question of weight 1": (
        {"messages": [{"role": "user", "content": "x", "weight": 1}, *CHAT["messages"]]},
        "messages[0]: 'weight' is 1 for a turn of 'user'; only answers can be trained",
    ),
    "marks that contradict": (
        {"messages": [{"role": "assistant", "content": "x", "weight": 1, "train": False}]},
        "'weight' and 'train' contradict each other",
    ),
    "tools of no list": ({**CHAT, "tools": 7}, "'tools' is 7; it must be a list"),
    "two system texts": (
        {"messages": [{"role": "system", "content": "x"}, *CHAT["messages"]], "system": "y"},
        "'system' and the first turn are two different system texts",
    ),
    "text for conversations": ({"conversations": "x"}, "'conversations' is 'x'"),
    "marks of parts of an answer": (
        {"messages": [{"role": "assistant", "content": "x", "train_detail": [{"begin_offset": 0}]}]},
        "messages[0]: 'train_detail' marks parts of a turn, which cannot be trained apart",
    ),
    "a list of marks": (
        {"messages": [{"role": "assistant", "content": "x", "loss_mask": [0, 1]}]},
        "'loss_mask' is a list of 2; it must be 0 or 1",
    ),
    "thinking without end": (
        {"messages": [{"role": "assistant", "content": "<think> so"}]},
        "the answer begins with <think>, which is not closed",
    ),
    "thinking alone": (
        {"instruction": "a", "output": "<think>b</think>\n"},
        "the answer is blank apart from its thinking",
    ),
    "messages in an object": (
        {"input": {"messages": [{"role": "user", "content": "x"}]}, "output": "y"},
        "'instruction' is missing; its keys: 'input (messages), output'; if another column holds it, give --columns",
    ),
    "history that is no JSON": (
        {"instruction": "a", "output": "b", "history": "(('q', 'a'),)"},
        "'history' is \"(('q', 'a'),)\"; it must be a list of pairs",
    ),
    "turns as Python writes them": (
        {"messages": "[{'role': 'user'}]"},
        "; it must be a list of messages, or one in JSON",
    ),
    "unknown from": ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0]: unknown 'from' 'bot'"),
    "number for from": ({"conversations": [{"from": 1, "value": "x"}]}, "'from' is 1 (int)"),
    "no role and no text": ({"messages": [{"name": "x"}]}, "messages[0]: 'role' and 'content' are missing"),
    "no value": ({"conversations": [{"from": "gpt"}]}, "conversations[0]: 'value' is missing; its keys: 'from'"),
    "null value": ({"conversations": [{"from": "gpt", "value": None}]}, "'value' is null"),
    "completion without answer": (
        {"prompt": CHAT["messages"], "completion": CHAT["messages"][:1]},
        "no message of the assistant",
    ),
    "no answers": ({"messages": [{"role": "human", "content": "x"}]}, "no message of the assistant, only user"),
    "empty list of a prompt": ({"prompt": [], "completion": CHAT["messages"]}, "'prompt' is an empty list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_with_its_place_or_is_counted(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row, reason = BAD_ROWS[name]
    rows = [PlacedRow("f:1", ALPACA), PlacedRow("f:2", row), PlacedRow("f:3", CHAT)]
    with pytest.raises(DataError) as stopped:
        encode(rows, tokenizer)
    message = str(stopped.value)
    assert message.startswith("f:2: ")
    assert reason in message
    assert "\n" not in message
    skipped = SkippedRows()
    options = SupervisionOptions(max_length=1000)
    found = encode_rows(rows, tokenizer, options, on_bad_row="skip", skipped=skipped)
    assert [found[index].place for index in range(len(found))] == ["f:1", "f:3"]
    assert (found.counts.rows_read, len(skipped)) == (3, 1)
    (kind,) = skipped.counts
    assert message == f"{skipped.first(kind)[0].place}: {skipped.first(kind)[0].reason}"


def fails(row: Any) -> Any:
    return row["output"].no_such_attribute


@pytest.mark.parametrize(
    ("format_fn", "reason"),
    [
        (lambda row: row["question"], "format_fn asks for 'question'"),
        (fails, "format_fn raised AttributeError: \"'str' object has no attribute"),
        (lambda row: 7, "format_fn returned 7"),
        (lambda row: ("a", ""), "the answer is blank"),
        (lambda row: ("", "a"), "the prompt is empty"),
        (lambda row: ("a", "\udcff"), "the answer has the lone surrogate U+DCFF"),
    ],
)
def test_a_format_function_that_fails_is_a_fault_of_the_row(format_fn: Callable[[Any], Any], reason: str) -> None:
    with pytest.raises(DataError) as stopped:
        encode_rows([ALPACA], BYTES, SupervisionOptions(), format_fn)
    assert str(stopped.value).startswith("row 0: ")
    assert reason in str(stopped.value)


def test_rows_skipped_by_both_readers_are_counted_together(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\nx\n{"prompt": "a"}\n')
    skipped = SkippedRows()
    options = RowOptions(rows=[str(tmp_path / "rows.jsonl")], on_bad_row="skip")
    rows = encode_rows(read_rows(options, skipped), BYTES, SupervisionOptions(), on_bad_row="skip", skipped=skipped)
    assert (len(rows), rows.counts.rows_read) == (1, 3)
    assert {kind: left.rows for kind, left in rows.counts.skipped.items()} == {"broken JSON": 1, "missing key": 1}


def test_ids_outside_the_models_vocabulary_are_refused() -> None:
    encoding = tiktoken.Encoding(
        "late",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([b]): b + 1 for b in range(256)},
        special_tokens={"<|endoftext|>": 0},
    )
    rows = [PAIR, {"prompt": "é", "completion": "x"}]
    assert len(encode_rows(rows, encoding, SupervisionOptions(), vocab_size=257)) == 2
    with pytest.raises(DataError, match="row 1: the tokenizer gives id 196, but the model's vocab_size is 196"):
        encode_rows(rows, encoding, SupervisionOptions(), vocab_size=196)
    skipped = SkippedRows()
    encode_rows(rows, encoding, SupervisionOptions(), vocab_size=196, on_bad_row="skip", skipped=skipped)
    assert skipped.counts == {"id outside the vocabulary": 1}
    with pytest.raises(UsageError, match="EOS has id 256, but the model's vocab_size is 256"):
        encode_rows(rows, BYTES, SupervisionOptions(), vocab_size=256)


def test_a_row_of_ten_megabytes_is_encoded_or_refused_with_its_length(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "p", "completion": "x" * 10_000_000}
    assert len(encode([row], max_length=10_000_001).ids) == 10_000_002
    with pytest.raises(DataError, match=r"row 0: 10000001 tokens \(1 of them before the first answer\), more than"):
        encode([row])
    blank = {"prompt": "p", "completion": "x" + " " * 2_000_000}
    with pytest.raises(DataError, match="row 0: "):
        encode([blank])


def test_white_space_that_tiktoken_cannot_split_is_a_fault_of_the_row(gpt2_encoding: tiktoken.Encoding) -> None:
    # GPT-2's own pattern is encoded in parts; another one is beyond tiktoken's limit on backtracking.
    other = tiktoken.Encoding(
        "other",
        pat_str=rf"{gpt2_encoding._pat_str}|(?!)",
        mergeable_ranks=gpt2_encoding._mergeable_ranks,
        special_tokens=gpt2_encoding._special_tokens,
    )
    with pytest.raises(DataError, match="row 0: the answer of 2,000,001 characters cannot be split"):
        encode([{"prompt": "p", "completion": " " * 2_000_000 + "x"}], other)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_truncation_cuts_the_prompt_from_the_left_and_never_an_answer(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    row: dict[str, Any] = {"prompt": "0123456789", "completion": "abc"}
    if kind == "chat":
        row = {"messages": [{"role": "user", "content": "0123456789"}, {"role": "assistant", "content": "abc"}]}
    whole = encode([row], tokenizer)
    n_ids = len(whole.ids)
    for max_length in range(1, n_ids + 1):
        options = SupervisionOptions(max_length=max_length, truncation="truncate_prompt")
        if max_length < 4:  # a token before the answer, and its three: what the model reads
            with pytest.raises(
                DataError, match=r"\(1 dropped: longer than max_length\); one of them: row 0: the answers"
            ):
                encode_rows([row], tokenizer, options)
            rows = encode_rows([row, PAIR], tokenizer, options) if max_length == 3 else None
            assert rows is None or rows.counts.summary() == "2 read, 1 used, 1 dropped"
            continue
        rows = encode_rows([row], tokenizer, options)
        kept = min(n_ids, max_length + 1)
        assert rows.ids.tolist() == whole.ids[n_ids - kept :].tolist()
        assert rows.trained.tolist() == whole.trained[n_ids - kept :].tolist()
        assert trained_text(rows, 0) == "abc<|endoftext|>"
        assert rows.counts.rows_truncated == (max_length + 1 < n_ids)
        # The items of both datasets hold all targets.
        assert (PackedRows(rows)[0][1] != -100).sum() == 4


def test_a_turn_of_the_assistant_in_the_prompts_beginning_is_not_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = {"messages": [*CHAT["messages"], *CHAT["messages"]]}
    n_ids = len(encode([rows], tokenizer).ids)
    before = len("### User:\nhi\n\n### Assistant:\n")
    cut = encode([rows], tokenizer, truncation="truncate_prompt", max_length=n_ids - before)
    assert trained_text(cut, 0) == "ho<|endoftext|>" * 2
    with pytest.raises(DataError, match="1 dropped"):
        encode([rows], tokenizer, truncation="truncate_prompt", max_length=n_ids - before - 1)


def test_too_long_rows_stop_or_are_dropped_and_counted() -> None:
    long = PlacedRow("f.json:9", {"prompt": "0123", "completion": "abc"})
    assert len(encode([long], max_length=7)) == 1
    with pytest.raises(DataError, match=r"f.json:9: 7 tokens \(4 of them before the first answer\)"):
        encode([PAIR, long], max_length=6)
    rows = encode([PAIR, long], max_length=6, truncation="drop")
    assert rows.counts.summary() == "2 read, 1 used, 1 dropped"
    (left_out,) = rows.counts.dropped["longer than max_length"].first
    assert left_out.startswith("f.json:9: 7 tokens")


def test_the_error_for_no_rows_left_names_the_reasons_and_a_row() -> None:
    options = SupervisionOptions(max_length=3, truncation="drop")
    with pytest.raises(DataError) as raised:
        encode_rows([{}, {"prompt": "a" * 9, "completion": "b"}, {}], BYTES, options, on_bad_row="skip")
    assert re.fullmatch(
        r"no row is left: 3 read, all of them left out \(2 skipped: [a-z ]+; 1 dropped: longer than max_length\); "
        r"one of them: row 0: .*; correct rows or raise max_length",
        str(raised.value),
    )
    with pytest.raises(DataError, match="no row is left: 0 read"):
        encode([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "alpacca"}, "did you mean 'alpaca'"),
        ({"train_on": "answer"}, "did you mean 'answers'"),
        ({"truncation": "cut"}, "unknown truncation 'cut'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 1.5}, "max_length must be an integer, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SupervisionOptions(**options)


def test_tokenizers_that_cannot_be_used_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match=r"chat rows need a tokenizer of transformers"):
        encode([CHAT])
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for mode in ("stop", "skip"):  # no row's fault, so it is not skipped
        with pytest.raises(UsageError, match="no generation marks"):
            encode_rows([CHAT], bare, SupervisionOptions(), on_bad_row=mode)
    with pytest.raises(UsageError, match="no generation marks"):  # before a row is read
        encode_rows([], bare, SupervisionOptions(format="chat"))
    bare.eos_token = None
    with pytest.raises(UsageError, match="no EOS"):
        encode([PAIR], bare)


# A template that marks fewer answers than there are must not pass: it leaves all turns but the last unmarked.
LAST_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def test_a_template_that_marks_some_answers_only_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = LAST_ONLY
    assert trained_text(encode([CHAT], other), 0) == "ho<|endoftext|>"
    with pytest.raises(DataError, match="marks 1 answers of 2"):
        encode([{"messages": [*CHAT["messages"], *CHAT["messages"]]}], other)


def random_rows(n_rows: int, seed: int, longest: int = 20) -> SupervisedRows:
    draw = np.random.default_rng(seed)

    def text() -> str:
        return "".join(chr(c) for c in draw.integers(97, 123, draw.integers(1, longest // 2)))

    rows = [{"prompt": text(), "completion": text()} for _ in range(n_rows)]
    return encode_rows(rows, BYTES, SupervisionOptions(max_length=longest))


def targets_of(rows: SupervisedRows) -> list[tuple[tuple[int, ...], int]]:
    """Each trained token with all that comes before it in its row."""
    found = []
    for index in range(len(rows)):
        ids = rows[index].input_ids.tolist()
        found += [(tuple(ids[:at]), ids[at]) for at in np.flatnonzero(rows[index].trained)]
    return sorted(found)


def targets_in(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """The same, read from a batch: what comes before is what the positions count back."""
    found = []
    for row in range(len(batch.input_ids)):
        for at in np.flatnonzero(batch.targets[row] != -100):
            start = at - int(batch.position_ids[row, at]) if batch.position_ids is not None else 0
            found.append((tuple(batch.input_ids[row, start : at + 1].tolist()), int(batch.targets[row, at])))
    return sorted(found)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_length", [20, 33, 200])
def test_each_target_is_trained_once_after_what_comes_before_it_in_its_row(seed: int, max_length: int) -> None:
    rows = random_rows(1 + seed * 7, seed)
    packed, padded = PackedRows(rows, max_length), PaddedRows(rows)
    assert sorted(number for group in packed.sequences for number in group) == list(range(len(rows)))
    for dataset in (packed, padded):
        batch = dataset.collate([dataset[index] for index in range(len(dataset))])  # type: ignore[arg-type]
        assert targets_in(batch) == targets_of(rows)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.position_ids is None


@pytest.mark.parametrize("max_length", [3, 97, 128, 333])
def test_padded_batches_have_few_lengths(max_length: int) -> None:
    texts = [{"prompt": "Q", "completion": "a" * count} for count in range(1, max_length - 1)]
    rows = PaddedRows(encode(texts, max_length=max_length))
    assert int(rows.lengths.max()) == max_length - 1
    lengths = set()
    for row, longest in enumerate(rows.lengths.tolist()):
        batch = rows.collate([rows[0], rows[row]])
        length = rows.batch_length([0, row])
        assert batch.input_ids.shape == batch.targets.shape == (2, length)
        assert longest <= length <= min(max_length, longest + longest // 8)
        assert (batch.input_ids[1, longest:] == END).all()
        assert (batch.targets[1, longest:] == -100).all()
        lengths.add(length)
    assert len(lengths) <= max(1, len(texts) // 2)


def test_the_padding_of_a_sequence_is_an_untrained_document() -> None:
    rows = encode([PAIR, PAIR], max_length=11)
    ids, targets, positions = PackedRows(rows)[0]
    assert ids.tolist() == [*b"Q: A", *b"Q: A", END, END, END]
    assert positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    one = [-100, *b" A", END]
    assert targets.tolist() == [*one, *one, -100, -100, -100]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_decreasing_equals_a_plain_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(5, 60))
    lengths = draw.integers(1, capacity + 1, draw.integers(1, 80))
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [group for group, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda group: spaces[group])] -= length
        else:
            spaces.append(capacity - length)
    groups = best_fit_decreasing(lengths, capacity)
    assert sorted(capacity - sum(int(lengths[n]) for n in group) for group in groups) == sorted(spaces)
    assert groups == best_fit_decreasing(lengths.copy(), capacity)


def tiny_model() -> GPTModel:
    sizes = {"vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16, "max_position_embeddings": 64}
    return GPTModel(create_model_config("nano-xs", **sizes)).double().eval()


def test_the_loss_of_packed_rows_equals_that_of_rows_alone() -> None:
    model, rows = tiny_model(), random_rows(23, 3)
    packed, padded = PackedRows(rows, 64), PaddedRows(rows)
    sums = []
    for dataset, size in ((packed, 2), (padded, 4), (padded, 1)):
        loader: Any = DataLoader(dataset, batch_size=size, collate_fn=dataset.collate)  # type: ignore[arg-type]
        with torch.no_grad():
            losses = [summed_batch_loss(b.input_ids, b.targets, model, position_ids=b.position_ids) for b in loader]
        assert sum(int(loss.n_trained) for loss in losses) == int(rows.trained.sum())
        sums.append(sum(float(loss.loss_sum) for loss in losses))
    assert sums[0] == pytest.approx(sums[2], rel=1e-5)
    assert sums[1] == pytest.approx(sums[2], rel=1e-5)


def test_split_is_deterministic_and_whole(shared_data: Path) -> None:
    options = RowOptions(rows=[str(shared_data / "instruction-data.json")])
    rows = encode_rows(read_rows(options), BYTES, SupervisionOptions(max_length=2000))
    subsets = rows.split([0.85, 0.1, 0.05], seed=1)
    assert [len(subset) for subset in subsets] == [935, 110, 55]
    seen = {subset[index].place: subset[index] for subset in subsets for index in range(len(subset))}
    assert len(seen) == 1100
    for index in range(0, 1100, 37):
        row = seen[rows.place(index)]
        assert row.input_ids.tolist() == rows[index].input_ids.tolist()
        assert row.trained.tolist() == rows[index].trained.tolist()
    again, other = rows.split([0.85, 0.1, 0.05], seed=1), rows.split([0.85, 0.1, 0.05], seed=2)
    assert [subset.fingerprint() for subset in again] == [subset.fingerprint() for subset in subsets]
    assert other[0].fingerprint() != subsets[0].fingerprint()
    lines = [int(subsets[0].place(index).rpartition(":")[2]) for index in range(935)]
    assert lines == sorted(lines)


@pytest.mark.parametrize("fractions", [[], [0.5], [0.5, 0.6], [1.0, 0.0], [1.5, -0.5], [math.nan, 1.0]])
def test_fractions_that_are_no_split_are_refused(fractions: list[float]) -> None:
    with pytest.raises(UsageError, match="above 0 and sum to 1"):
        random_rows(5, 0).split(fractions, 0)


def test_a_split_with_an_empty_subset_is_refused() -> None:
    with pytest.raises(DataError, match="2 rows cannot be split"):
        random_rows(2, 0).split([0.9, 0.1], 0)


def test_the_fingerprint_tells_ids_boundaries_and_marks_apart() -> None:
    pairs = [("ab", "cd"), ("ac", "bd"), ("abc", "d")]
    prints = {encode([{"prompt": p, "completion": c}]).fingerprint() for p, c in pairs}
    everything = encode([{"prompt": "ab", "completion": "cd"}], train_on="everything").fingerprint()
    assert len({*prints, everything}) == 4
    # Where a row was read from changes nothing that is trained.
    assert encode([PlacedRow("elsewhere", {"prompt": "ab", "completion": "cd"})]).fingerprint() in prints


def test_rows_and_their_datasets_can_be_pickled() -> None:
    packed = PackedRows(random_rows(9, 1))
    arrived = pickle.loads(pickle.dumps(packed))
    assert arrived.rows.fingerprint() == packed.rows.fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(arrived[0], packed[0], strict=True))


def test_a_sequence_shorter_than_a_row_and_an_index_beyond_the_rows_are_refused() -> None:
    rows = random_rows(9, 1)
    with pytest.raises(UsageError, match="max_length=3: the longest row has"):
        PackedRows(rows, 3)
    for index in (9, -1):
        with pytest.raises(IndexError):
            rows[index]
