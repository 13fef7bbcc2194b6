from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import byte_tokenizer, write_tiny_model
from transformers import PreTrainedTokenizerBase

from gpt_kit_hf.data.instructions.inspect import inspect_rows
from gpt_kit_hf.data.instructions.rows import PlacedRow
from gpt_kit_hf.data.instructions.templates import with_template
from gpt_kit_hf.data.instructions.tokenized import encode_rows
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.options.data import RowOptions, SupervisionOptions
from gpt_kit_hf.options.finetuning import BaseOptions
from gpt_kit_hf.options.run import FinetuneOptions
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.tokenization.chat_templates import ALPACA_TEMPLATE, DEFAULT_TEMPLATE
from gpt_kit_hf.training.finetune import finetune

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
ALPACA = {"instruction": "Say x.", "input": "", "output": "x"}
CHAT_LINE = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


@pytest.fixture
def bare(tmp_path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer without a chat template."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = None
    return tokenizer


def placed(*rows: Any) -> Iterator[PlacedRow]:
    return (PlacedRow(f"row {number}", row) for number, row in enumerate(rows))


@pytest.mark.parametrize("choice", ["keep", "default", "alpaca"])
def test_format_chat_uses_the_chosen_template_on_a_tokenizer_without_one(
    choice: str, bare: PreTrainedTokenizerBase
) -> None:
    rows = with_template(placed(CHAT), bare, choice, "chat")
    encoded = encode_rows(rows, bare, SupervisionOptions(format="chat"))
    assert bare.chat_template == (ALPACA_TEMPLATE if choice == "alpaca" else DEFAULT_TEMPLATE)
    row = encoded[0]
    assert bytes(row.input_ids[row.trained][:-1].tolist()) == b"ho"


@pytest.mark.parametrize(
    ("row", "template"), [(CHAT, DEFAULT_TEMPLATE), (ALPACA, ALPACA_TEMPLATE), ({}, DEFAULT_TEMPLATE)]
)
def test_the_template_is_set_before_the_rows_are_read(row: Any, template: str, bare: PreTrainedTokenizerBase) -> None:
    rows = with_template(placed(row), bare, "keep")
    assert bare.chat_template == template
    assert list(rows) == [PlacedRow("row 0", row)]


def test_a_row_without_a_format_does_not_choose_the_template(bare: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """It is skipped; if bad rows stop, the first of them is named, though reading goes further."""
    rows = list(with_template(placed({}, {"a": "b"}, ALPACA, CHAT), bare, "keep"))
    assert bare.chat_template == ALPACA_TEMPLATE
    assert [row.place for row in rows] == ["row 0", "row 1", "row 2", "row 3"]
    (tmp_path / "rows.jsonl").write_text('{}\n{"prompt"\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        inspect_rows(RowOptions(rows=[str(tmp_path / "rows.jsonl")]), SupervisionOptions())
    (tmp_path / "rows.jsonl").write_text('{}\n{"prompt": "why? ", "completion": "so"}\n')
    report = inspect_rows(RowOptions(rows=[str(tmp_path / "rows.jsonl")], on_bad_row="skip"), SupervisionOptions())
    assert "\nwhy? ⟦so<|endoftext|>⟧" in report.text()


def test_a_chosen_template_is_set_though_there_are_no_rows(bare: PreTrainedTokenizerBase) -> None:
    assert list(with_template(placed(), bare, "default")) == []
    assert bare.chat_template == DEFAULT_TEMPLATE


def test_the_template_of_the_tokenizer_is_kept(bare: PreTrainedTokenizerBase) -> None:
    bare.chat_template = DEFAULT_TEMPLATE
    (row,) = with_template(placed(ALPACA), bare, "keep")
    assert bare.chat_template == DEFAULT_TEMPLATE
    assert row.row["messages"][0] == {"role": "user", "content": "Say x."}
    with pytest.raises(UsageError, match="format='alpaca' writes other prompts"):
        list(with_template(placed(ALPACA), bare, "keep", "alpaca"))


def test_inspect_of_chat_rows_needs_no_template_of_the_model(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(CHAT_LINE)
    write_tiny_model(tmp_path / "model")
    for model in (None, str(tmp_path / "model")):
        for row_format in ("auto", "chat"):
            options = SupervisionOptions(format=row_format)  # type: ignore[arg-type]
            report = inspect_rows(RowOptions(rows=[str(file)]), options, model=model)
            assert (report.rows_used, report.tokens_trained, report.ends_trained) == (1, 3, 1)


def test_finetune_of_chat_rows_needs_no_template_of_the_model(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(CHAT_LINE * 8)
    write_tiny_model(tmp_path / "model")
    options = FinetuneOptions(
        training=TrainingOptions(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to=["none"]),
        base=BaseOptions(model_name_or_path=str(tmp_path / "model"), chat_template="default"),
        rows=RowOptions(rows=[str(file)]),
        supervision=SupervisionOptions(format="chat", max_length=64),
    )
    finetune(options, stream=None)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_bad_first_row_is_named(bare: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="row 0: the row has neither"):
        encode_rows(with_template(placed({}, CHAT), bare, "keep"), bare, SupervisionOptions())


def test_rows_of_several_formats_whose_first_sets_no_template_are_refused(bare: PreTrainedTokenizerBase) -> None:
    for other in (ALPACA, CHAT):
        rows = with_template(placed({"prompt": "why? ", "completion": "so"}, other), bare, "keep")
        with pytest.raises(UsageError, match=r"^row 1: a row of the format .* set chat_template to default"):
            list(rows)
    assert bare.chat_template is None


@pytest.mark.parametrize("other", [ALPACA, CHAT])
def test_evaluation_rows_do_not_choose_the_template(other: dict[str, Any], tmp_path: Path) -> None:
    """The saved tokenizer has the template of the training rows, or none if they used none."""
    rows, eval_rows = tmp_path / "rows.jsonl", tmp_path / "eval.jsonl"
    rows.write_text('{"prompt": "why? ", "completion": "so"}\n' * 8)
    eval_rows.write_text(json.dumps(other) + "\n")
    write_tiny_model(tmp_path / "model")
    options = FinetuneOptions(
        training=TrainingOptions(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to=["none"]),
        base=BaseOptions(model_name_or_path=str(tmp_path / "model"), eval_rows=[str(eval_rows)]),
        rows=RowOptions(rows=[str(rows)]),
        supervision=SupervisionOptions(max_length=64),
    )
    with pytest.raises(UsageError, match=r"eval\.jsonl:1: a row of the format .* needs a chat template"):
        finetune(options, stream=None)
