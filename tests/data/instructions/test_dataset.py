from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tiktoken
import torch
from datasets import Dataset as ArrowDataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedTokenizerFast

from gpt_kit_hf.data.instructions.dataset import InstructionDataset, InstructionItem, create_instruction_collate_fn
from gpt_kit_hf.data.instructions.formats import format_alpaca, prompt_and_answer
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.tokenization.encodings import get_encoding, save_tokenizer

ROW = {"instruction": "Translate", "input": "Hello", "output": "Bonjour"}
PAD = 256
Entry = Mapping[str, Any]


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return get_encoding("bytes")


def kit_prompt(entry: Entry) -> str:
    """What hand-written loops usually have: the prompt without the header of the response."""
    head = f"### Instruction:\n{entry['instruction']}"
    return head + f"\n\n### Input:\n{entry['input']}" if entry["input"] else head


def whole_text(entry: Entry) -> str:
    return f"Q: {entry['instruction']} {entry['input']}\nA: {entry['output']}"


def test_alpaca_prompt_with_and_without_input() -> None:
    assert format_alpaca(ROW).split("\n") == [
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.",
        "",
        "### Instruction:",
        "Translate",
        "",
        "### Input:",
        "Hello",
        "",
        "### Response:",
        "",
    ]
    for blank in ["", "  \n"]:
        assert format_alpaca({"instruction": "Sing", "input": blank}).split("\n") == [
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            "",
            "### Instruction:",
            "Sing",
            "",
            "### Response:",
            "",
        ]


@pytest.mark.parametrize(
    ("format_fn", "prompt", "answer"),
    [
        (format_alpaca, format_alpaca(ROW), "Bonjour"),
        (
            kit_prompt,
            "### Instruction:\nTranslate\n\n### Input:\nHello\n\n### Response:\n",
            "Bonjour",
        ),
        (lambda e: f"Do: {e['instruction']}\n### Response:  \n\n", "Do: Translate\n### Response:\n", "Bonjour"),
        (whole_text, "Q: Translate Hello\nA: ", "Bonjour"),
        (lambda e: whole_text(e) + "<|im_end|>\n", "Q: Translate Hello\nA: ", "Bonjour<|im_end|>\n"),
        (lambda e: f"A: {e['output'].upper().strip()}!", "A: ", "BONJOUR!"),
        (lambda e: (f"{e['instruction']}:", e["output"] + "\n"), "Translate:", "Bonjour\n"),
    ],
)
def test_the_answer_is_found_in_what_a_format_function_returns(
    format_fn: Callable[[Entry], Any], prompt: str, answer: str
) -> None:
    assert prompt_and_answer(ROW, format_fn) == (prompt, answer)


def test_a_prompt_that_happens_to_end_in_the_output_is_still_a_prompt() -> None:
    copied = {"instruction": "Repeat", "input": "Bonjour", "output": "Bonjour"}
    prompt, answer = prompt_and_answer(copied, kit_prompt)
    assert prompt == "### Instruction:\nRepeat\n\n### Input:\nBonjour\n\n### Response:\n"
    assert answer == "Bonjour"
    assert prompt_and_answer(copied, whole_text) == ("Q: Repeat Bonjour\nA: ", "Bonjour")


def test_random_rows_join_to_the_text_that_the_function_wrote() -> None:
    dice = random.Random(11)
    words = ["a", "Bonjour", "### Response:", "\n", " ", "é", "A:", "output", "."]
    for _ in range(300):
        row = {name: "".join(dice.choices(words, k=4)) + "x" for name in ("instruction", "input", "output")}
        prompt, answer = prompt_and_answer(row, whole_text)
        assert prompt + answer == whole_text(row)
        assert answer == row["output"]
        assert prompt_and_answer(row, kit_prompt) == (
            f"{kit_prompt(row)}\n\n### Response:\n",
            row["output"],
        )


def one_of_two_templates() -> Callable[[Entry], str]:
    heads = itertools.cycle(["Question: ", "Ask: "])
    return lambda entry: next(heads) + whole_text(entry)


@pytest.mark.parametrize(
    ("format_fn", "message"),
    [
        (lambda e: f"{e['output']} is {e['output']}", "writes the output 2 times"),
        (one_of_two_templates(), "more than the answer"),
        (lambda e: f"{len(e['output'])}: {e['output']}", "more than the answer"),
        (lambda e: f"Length: {len(e['output'])}", "writes the output 0 times"),
        (lambda e: {"Bonjour": "Say Bonjour"}[e["output"]], "fails if only the output changes"),
        (lambda e: f"{e['question']}", "asks for 'question'"),
        (lambda e: None, "returned None"),
        (lambda e: ("prompt",), "returned"),
        (lambda e: ("prompt", 3), "returned"),
        (lambda e: ("prompt", " \n"), "answer is blank"),
        (lambda e: ("", "answer"), "prompt is empty"),
        (lambda e: e["output"], "prompt is empty"),
    ],
)
def test_format_functions_that_hide_the_answer_are_named(
    format_fn: Callable[[Entry], Any], message: str, encoding: tiktoken.Encoding
) -> None:
    with pytest.raises(DataError, match=rf"^data\[0\]: .*{message}"):
        InstructionDataset([ROW], encoding, format_fn)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Translate", "input": "Hello"}, "'output' is missing"),
        ({"input": "", "output": "x"}, "'instruction' is missing; its keys: 'input, output'"),
        ({"input": ""}, "'instruction' and 'output' are missing"),
        (ROW | {"history": [["a", "b"]]}, "'history' is not written by format_alpaca"),
        (ROW | {"system": "Be kind."}, "'system' is not written by format_alpaca"),
        (ROW | {"output": None}, "'output' is null"),
        (ROW | {"input": math.nan}, "'input' is NaN"),
        (ROW | {"output": 3}, r"'output' is 3 \(int\)"),
        (ROW | {"output": ""}, "'output' is blank"),
        (ROW | {"output": " \n"}, "'output' is blank"),
        (ROW | {"instruction": " "}, "'instruction' is blank"),
        (ROW | {"output": "\ud800"}, "U\\+D800"),
        (["Translate", "Hello", "Bonjour"], "a row is a dict"),
        (None, "a row is a dict"),
    ],
)
def test_unusable_rows_are_named_with_their_number(row: Any, message: str, encoding: tiktoken.Encoding) -> None:
    with pytest.raises(DataError, match=rf"^data\[2\]: .*{message}"):
        InstructionDataset([ROW, ROW, row, ROW], encoding)


def test_a_null_never_becomes_the_text_none(encoding: tiktoken.Encoding) -> None:
    with pytest.raises(DataError, match=r"data\[1\]: 'output' is null"):
        InstructionDataset([ROW, ROW | {"output": None}], encoding, whole_text)


def test_a_missing_or_null_input_is_empty_and_other_names_are_known(encoding: tiktoken.Encoding) -> None:
    pair = {"instruction": "Sing", "output": "la"}
    rows = [pair | {"input": ""}, pair, pair | {"input": None}, {"question": "Sing", "response": "la"}]
    dataset = InstructionDataset(rows, encoding)
    assert all(dataset[index] == dataset[0] for index in range(len(rows)))


def test_items_are_prompt_ids_then_answer_ids(encoding: tiktoken.Encoding) -> None:
    rows = [ROW, {"instruction": "Sing", "input": "", "output": "<|endoftext|> là"}]
    dataset = InstructionDataset(rows, encoding)
    assert len(dataset) == 2
    for row, item in zip(rows, dataset, strict=True):
        prompt = format_alpaca(row).encode()
        assert item.prompt_length == len(prompt)
        assert item.input_ids == list(prompt + row["output"].encode())  # no EOS, not even one spelled out
    assert dataset[-1] == dataset[1]
    assert pickle.loads(pickle.dumps(dataset))[1] == dataset[1]
    with pytest.raises(IndexError, match="2 rows"):
        dataset[2]
    with pytest.raises(IndexError):
        dataset[-3]


def test_the_boundary_lies_between_tokens_that_would_merge(gpt2_encoding: tiktoken.Encoding) -> None:
    def format_fn(entry: Entry) -> tuple[str, str]:
        return "The ans", "wer"

    (item,) = InstructionDataset([ROW], gpt2_encoding, format_fn)
    merged = gpt2_encoding.encode_ordinary("The answer")
    assert item.input_ids != merged
    assert gpt2_encoding.decode(item.input_ids[: item.prompt_length]) == "The ans"
    assert gpt2_encoding.decode(item.input_ids) == "The answer"


def test_a_transformers_tokenizer_and_an_arrow_dataset_give_the_same_items(
    encoding: tiktoken.Encoding, tmp_path: Any
) -> None:
    rows = [ROW, {"instruction": "Sing", "input": "", "output": "là"}]
    expected = list(InstructionDataset(rows, encoding))
    save_tokenizer(encoding, tmp_path)
    exported = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert list(InstructionDataset(rows, exported)) == expected
    assert list(InstructionDataset(ArrowDataset.from_list(rows), encoding)) == expected


def test_long_rows_stop_or_are_dropped_and_noted(encoding: tiktoken.Encoding) -> None:
    rows = [ROW | {"output": "x" * n} for n in (3, 9, 5, 10)]
    n_prompt = len(format_alpaca(ROW))
    assert len(InstructionDataset(rows, encoding, max_length=n_prompt + 10)) == 4
    with pytest.raises(DataError, match=rf"data\[1\]: {n_prompt + 9} tokens .*max_length={n_prompt + 8}"):
        InstructionDataset(rows, encoding, max_length=n_prompt + 8)
    dataset = InstructionDataset(rows, encoding, max_length=n_prompt + 8, truncation="drop")
    assert dataset.dropped == [1, 3]
    assert [len(item.input_ids) - item.prompt_length for item in dataset] == [3, 5]
    with pytest.raises(DataError, match="4 dropped"):
        InstructionDataset(rows, encoding, max_length=1, truncation="drop")
    with pytest.raises(DataError, match="no row"):
        InstructionDataset([], encoding)
    with pytest.raises(UsageError, match="max_length=0"):
        InstructionDataset(rows, encoding, max_length=0)
    with pytest.raises(UsageError, match="unknown truncation 'cut'"):
        InstructionDataset(rows, encoding, truncation="cut")  # type: ignore[arg-type]


def naive_batch(
    items: list[InstructionItem], pad: int, end: int, max_length: int | None, masked: bool
) -> tuple[Tensor, Tensor]:
    """Pad the whole rows first, shift second, then decide each target by its position in the row."""
    longest = max(min(len(item.input_ids), max_length or 10**9) for item in items)
    inputs, targets = [], []
    for item in items:
        row = [*item.input_ids, end] + [pad] * (longest + 1)
        inputs.append(row[:longest])
        target = []
        for position in range(1, longest + 1):
            is_prompt = position < item.prompt_length
            is_padding = position > len(item.input_ids)
            target.append(-100 if is_padding or (masked and is_prompt) else row[position])
        targets.append(target)
    return torch.tensor(inputs), torch.tensor(targets)


@pytest.mark.parametrize("end", [None, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("max_length", [None, 6])
def test_batches_equal_a_naive_reference(end: int | None, masked: bool, max_length: int | None) -> None:
    dice = random.Random(23)
    collate = create_instruction_collate_fn(
        PAD, end_of_text_id=end, mask_instruction=masked, max_length=max_length, truncation="cut"
    )
    for _ in range(200):
        items = []
        for _ in range(dice.randint(1, 5)):
            prompt_length = dice.randint(1, 6)
            # The padding id occurs inside rows: it must be trained there as any other.
            ids = [dice.choice([PAD, 7, 1, 2, 3]) for _ in range(prompt_length + dice.randint(1, 5))]
            items.append(InstructionItem(ids, prompt_length))
        inputs, targets = collate(items)
        expected = naive_batch(items, PAD, PAD if end is None else end, max_length, masked)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, expected[0])
        assert torch.equal(targets, expected[1])
        assert (targets != -100).any(dim=1).all()  # no row trains nothing


def test_a_batch_by_hand() -> None:
    items = [InstructionItem([10, 11, 12, 13], 2), InstructionItem([20, 21], 1)]
    inputs, targets = create_instruction_collate_fn(PAD)(items)
    assert inputs.tolist() == [[10, 11, 12, 13], [20, 21, PAD, PAD]]
    assert targets.tolist() == [[11, 12, 13, PAD], [21, PAD, -100, -100]]
    _, targets = create_instruction_collate_fn(PAD, mask_instruction=True, ignore_index=-1)(items)
    assert targets.tolist() == [[-1, 12, 13, PAD], [21, PAD, -1, -1]]
    plain: list[list[int]] = [item.input_ids for item in items]
    inputs, targets = create_instruction_collate_fn(PAD, end_of_text_id=9)(plain)
    assert inputs.tolist() == [[10, 11, 12, 13], [20, 21, 9, PAD]]
    assert targets.tolist() == [[11, 12, 13, 9], [21, 9, -100, -100]]
    assert plain == [[10, 11, 12, 13], [20, 21]]


def test_cut_rows_keep_an_answer_and_train_no_eos() -> None:
    item = InstructionItem([1, 2, 3, 4, 5], 3)
    with pytest.raises(DataError, match="row 1 of the batch: 5 tokens, more than max_length=4"):
        create_instruction_collate_fn(PAD, max_length=4)([InstructionItem([1, 2], 1), item])
    cut = create_instruction_collate_fn(PAD, max_length=3, truncation="cut", mask_instruction=True)
    inputs, targets = cut([item])
    assert inputs.tolist() == [[1, 2, 3]]
    assert targets.tolist() == [[-100, -100, 4]]
    exact = create_instruction_collate_fn(PAD, max_length=5)([item])
    assert exact[1].tolist() == [[2, 3, 4, 5, PAD]]
    with pytest.raises(DataError, match="prompt of 3 tokens leaves no token of the answer within max_length=2"):
        create_instruction_collate_fn(PAD, max_length=2, truncation="cut")([item])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"pad_token_id": None}, "pad_token_id=None"),
        ({"end_of_text_id": -5}, "end_of_text_id=-5"),
        ({"ignore_index": 0}, "ignore_index=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"truncation": "drop"}, "unknown truncation 'drop'"),
    ],
)
def test_collate_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_instruction_collate_fn(**({"pad_token_id": PAD} | options))


def test_rows_that_cannot_be_batched_are_named() -> None:
    with pytest.raises(UsageError, match="row 1 of the batch is a plain list"):
        create_instruction_collate_fn(PAD, mask_instruction=True)([InstructionItem([1, 2], 1), [1, 2]])
    with pytest.raises(DataError, match="row 0 of the batch has no tokens"):
        create_instruction_collate_fn(PAD)([[]])


def test_the_batch_is_on_the_device() -> None:
    inputs, targets = create_instruction_collate_fn(PAD, device="meta")([[1, 2]])
    assert inputs.device.type == targets.device.type == "meta"


def test_loaders_with_processes_and_with_other_collates(encoding: tiktoken.Encoding) -> None:
    rows = [ROW | {"output": "x" * n} for n in (3, 9, 5)]
    dataset = InstructionDataset(rows, encoding)
    collate = create_instruction_collate_fn(pad_token_id=PAD)
    assert pickle.loads(pickle.dumps(collate)) == collate
    expected = collate(list(dataset))
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    ((inputs, targets),) = loader
    assert torch.equal(inputs, expected[0])
    assert torch.equal(targets, expected[1])
    one = default_collate([dataset[0]])
    assert one.prompt_length.tolist() == [dataset[0].prompt_length]


def test_the_kits_usage_runs_as_written(gpt2_encoding: tiktoken.Encoding) -> None:
    tokenizer, format_fn = gpt2_encoding, kit_prompt
    instruction_data = [{"instruction": "Translate", "input": "Hello", "output": "Bonjour"}]
    dataset = InstructionDataset(instruction_data, tokenizer, format_fn)
    loader = DataLoader(dataset, batch_size=4, collate_fn=create_instruction_collate_fn(pad_token_id=50256))
    ((inputs, targets),) = loader
    text = "### Instruction:\nTranslate\n\n### Input:\nHello\n\n### Response:\nBonjour"
    assert tokenizer.decode(inputs[0].tolist()) == text
    assert tokenizer.decode(targets[0].tolist()) == text.removeprefix("###") + "<|endoftext|>"
