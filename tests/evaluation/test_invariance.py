"""The invariance matrix: our model holds everywhere, GPT-2 of transformers and models with a fault do not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Ended, gpt_kit
from shapes import SHAPES, both_shapes
from tiny_model import write_tiny_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.evaluation.invariance import CACHES, LAYOUTS, InvarianceReport, check_invariance
from gpt_kit_hf.model import modeling_gpt_kit
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM

PLAIN = ("eager", "sdpa")
# torch about torch itself, as it loads what flex attention needs.
FLEX = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIZES = {"vocab_size": 97, "n_embd": 32, "n_head": 2, "n_layer": 2}


def ours(**options: Any) -> GPTKitForCausalLM:
    config = GPTKitConfig(**{**SIZES, "max_position_embeddings": 32, "initializer_range": 0.1, **options})
    return GPTKitForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=32, initializer_range=0.1, bos_token_id=0, eos_token_id=0))


def fp32(model: PreTrainedModel, attention: str = "eager") -> InvarianceReport:
    return check_invariance(model, attention=[attention], precisions=["fp32"])


def failing(report: InvarianceReport) -> set[str]:
    return {f"{cell.layout}/{cell.cache}" for cell in report.failures}


def by_caches(*layouts: str) -> set[str]:
    return {f"{layout}/{cache}" for layout in layouts for cache in ("dynamic", "static")}


# --- what holds


@pytest.mark.parametrize("shape", SHAPES)
def test_our_model_holds_in_every_cell(shape: str) -> None:
    report = check_invariance(ours(**SHAPES[shape]), attention=PLAIN)
    assert report.holds, report.table()
    assert len({cell.name for cell in report.cells}) == len(report.cells) == 2 * 2 * len(LAYOUTS) * len(CACHES)
    assert report.remarks == ()
    for cell in report.cells:
        if cell.precision == "fp32":
            assert cell.compared_tokens == sum(report.row_lengths) == 39
        else:
            assert cell.compared_tokens > 10
    # The reference compared with itself gives 0; another attention does not, or nothing was compared.
    differences = {cell.name: cell.difference for cell in report.cells}
    assert differences["alone/none/eager/fp32"] == differences["alone/none/eager/bf16"] == 0.0
    assert differences["packed/none/sdpa/fp32"] != 0.0
    assert differences["packed/none/sdpa/bf16"] != 0.0


@FLEX
@both_shapes
def test_our_model_holds_in_flex_attention(shape: dict[str, Any]) -> None:
    report = fp32(ours(**shape), "flex_attention")
    assert report.holds, report.table()
    assert "ran uncompiled" in report.remarks[0]


@FLEX
@pytest.mark.slow
@both_shapes
def test_our_model_holds_in_every_attention_and_precision(shape: dict[str, Any]) -> None:
    report = check_invariance(ours(**shape))
    assert report.holds, report.table()
    assert len(report.cells) == 72


@pytest.mark.parametrize("table", [8, 9])
def test_a_short_position_table_is_enough(table: int) -> None:
    report = fp32(ours(max_position_embeddings=table))
    assert report.holds, report.table()
    assert max(report.row_lengths) == table


def test_the_rows_follow_from_the_seed() -> None:
    model = ours()
    first = fp32(model, "sdpa")
    assert fp32(model, "sdpa") == first
    assert check_invariance(model, attention=["sdpa"], precisions=["fp32"], seed=1).cells != first.cells


def test_the_model_is_not_changed() -> None:
    model = ours(use_cache=False).to(torch.bfloat16).train()
    model.set_attn_implementation("sdpa")
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    config = model.config.to_dict()
    assert check_invariance(model, attention=["eager"]).holds
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


# --- what does not


@pytest.mark.usefixtures("logged")
def test_gpt2_of_transformers_is_the_control_that_fails() -> None:
    report = check_invariance(gpt2())
    leaks = by_caches("packed", "right-padded", "left-padded") | {"left-padded/none"}
    for attention in PLAIN:
        for precision in ("fp32", "bf16"):
            found = {
                f"{cell.layout}/{cell.cache}"
                for cell in report.failures
                if (cell.attention, cell.precision) == (attention, precision)
            }
            # The rest holds, so that none of these fails for a reason of the check's own.
            assert found == leaks, report.table()
    assert {cell.attention for cell in report.cells} == set(PLAIN)
    assert "flex_attention left out: ValueError: GPT2LMHeadModel does not support" in report.remarks[0]


def _ignores_padding(count: Any, table: Tensor, length: int, mask: Tensor | None, past: Any) -> Any:
    return count(table, length, None, past)


def _counts_each_piece_from_zero(count: Any, table: Tensor, length: int, mask: Tensor | None, past: Any) -> Any:
    return count(table, length, None if mask is None else mask[:, -length:], 0)


def _forgets_packing(build: Any, config: Any, embeds: Any, mask: Any, position_ids: Any, *rest: Any) -> Any:
    return build(config, embeds, mask, None, *rest)


def _forgets_packing_before_an_empty_cache(
    build: Any, config: Any, embeds: Any, mask: Any, position_ids: Any, past_key_values: Any, *rest: Any
) -> Any:
    kept = position_ids if past_key_values is None or past_key_values.is_compileable else None
    return build(config, embeds, mask, kept, past_key_values, *rest)


def _sees_padding(build: Any, config: Any, embeds: Any, mask: Any, *rest: Any) -> Any:
    return build(config, embeds, None, *rest)


# The function of the model that is replaced, by what, and the cells that must fail.
FAULTS: list[tuple[str, Callable[..., Any], set[str]]] = [
    ("count_positions", _ignores_padding, by_caches("left-padded", "right-padded") | {"left-padded/none"}),
    ("document_mask", _forgets_packing, by_caches("packed") | {"packed/none"}),
    ("document_mask", _forgets_packing_before_an_empty_cache, {"packed/dynamic"}),
    ("document_mask", _sees_padding, by_caches("left-padded", "right-padded") | {"left-padded/none"}),
    ("count_positions", _counts_each_piece_from_zero, by_caches("alone", "left-padded", "right-padded")),
]


@pytest.mark.parametrize(("name", "fault", "cells"), FAULTS)
@pytest.mark.parametrize("attention", PLAIN)
def test_a_fault_fails_the_cells_that_have_it(
    name: str, fault: Callable[..., Any], cells: set[str], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_gpt_kit, name, functools.partial(fault, getattr(modeling_gpt_kit, name)))
    assert failing(fp32(ours(), attention)) == cells


class _NanWherePadded(GPTKitForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            output.logits[0, -1, 0] = torch.nan
        return output


class _RefusesPacking(GPTKitForCausalLM):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            raise RuntimeError("no position ids here. They were given\nall the same")
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


def test_nan_and_errors_are_results_too() -> None:
    model = ours()
    for kind, layouts, error in (
        (_NanWherePadded, {"left-padded", "right-padded"}, "of 3783 logits are not finite"),
        (_RefusesPacking, {"packed"}, "RuntimeError: no position ids here"),
    ):
        model.__class__ = kind
        report = fp32(model)
        assert {cell.layout for cell in report.failures} == layouts
        assert len(report.failures) == len(layouts) * len(CACHES)
        for cell in report.failures:
            assert cell.difference is None
            assert cell.error is not None
            assert error in cell.error or cell.cache == "dynamic"
            assert f"  {cell.name}: {cell.error}" in report.table().splitlines()
        stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert stored == report.to_dict()
        assert not stored["holds"]


class _TiesFallTheOtherWay(GPTKitForCausalLM):
    """Each token has a double, and outside the eager attention the double is the better by next to nothing."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        half = output.logits[..., :48]
        above = 1 + 1e-5 if output.logits.dtype == torch.float32 else 1 + 2**-7
        ahead = self.config._attn_implementation != "eager"
        output.logits = torch.cat((half, torch.where(half > 0, half * above, half) if ahead else half), dim=-1)
        return output


def test_greedy_tokens_count_in_fp32_and_ties_do_not_in_bf16() -> None:
    model = ours(vocab_size=96)
    model.__class__ = _TiesFallTheOtherWay
    report = check_invariance(model, attention=["sdpa"])
    for cell in report.cells:
        assert cell.difference is not None
        if cell.precision == "fp32":
            assert cell.difference < 1e-4
            assert cell.wrong_tokens == cell.compared_tokens == 39
            assert not cell.holds
        else:
            assert cell.difference > 0
            assert cell.compared_tokens == 0
            assert cell.holds


# --- mistakes


def test_invalid_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()
    with pytest.raises(UsageError, match="unknown attention 'flex_atention'; did you mean 'flex_attention'"):
        check_invariance(model, attention=["flex_atention"])
    with pytest.raises(UsageError, match="unknown precisions 'fp23'; did you mean 'fp32'"):
        check_invariance(model, precisions=["fp23"])
    with pytest.raises(UsageError, match="attention: name at least one of eager, sdpa, flex_attention"):
        check_invariance(model, attention=[])
    with pytest.raises(UsageError, match="max_position_embeddings=7: the check needs at least 8"):
        check_invariance(ours(max_position_embeddings=7))
    with pytest.raises(UsageError, match="attention 'flex_attention' cannot run: ValueError: GPT2LMHeadModel"):
        check_invariance(gpt2(), attention=["eager", "flex_attention"])

    def no_compiler(function: object) -> Any:
        raise RuntimeError("no C++ compiler\nInstall one")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UsageError, match=r"'flex_attention' cannot run: RuntimeError: no C\+\+ compiler$"):
        check_invariance(model, attention=["flex_attention"], compile_flex=True)
    report = check_invariance(model, precisions=["fp32"], compile_flex=True)
    assert report.remarks == ("flex_attention left out: RuntimeError: no C++ compiler",)
    assert {cell.attention for cell in report.cells} == set(PLAIN)
    assert report.holds


# --- the command


def check(*arguments: object) -> Ended:
    return gpt_kit("check", *arguments)


def test_the_command_shows_the_table_and_writes_it(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    done = check(tmp_path / "model", "--attention", "eager", "sdpa", "--output_json", tmp_path / "check.json")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("GPTKitForCausalLM on cpu, rows of 20, 13, 6 tokens")
    assert lines[-1] == "all 48 cells hold"
    assert lines[3].split() == ["fp32", "(at", "most", "1.0e-04)", *CACHES]
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert [row[:2] for row in rows] == [[a, layout] for a in PLAIN for layout in LAYOUTS] * 2
    assert {len(row) for row in rows} == {2 + len(CACHES)}
    assert rows[0][2] == "0.0e+00"
    assert "checking bf16, sdpa" in done.stderr
    stored = json.loads((tmp_path / "check.json").read_text())
    assert stored["holds"]
    assert stored["tolerances"] == {"fp32": 1e-4, "bf16": 0.0625}
    assert stored["torch"] == torch.__version__
    assert len(stored["cells"]) == 48
    assert f"{stored['cells'][13]['difference']:.1e}" == rows[4][3]


@pytest.mark.usefixtures("logged")
def test_the_command_fails_and_names_the_cells(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    done = check(tmp_path, "--attention=sdpa", "--output_json", tmp_path / "check.json")
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 14 of 24 cells fail: left-padded/none/sdpa/fp32, ")
    assert last.endswith(", packed/static/sdpa/bf16")
    left_padded = next(line.split() for line in done.stdout.splitlines() if "left-padded" in line)
    assert [cell[-1] for cell in left_padded[2:]] == ["!", "!", "!"]
    assert "  packed/dynamic/sdpa/fp32: logits " in done.stdout
    assert not json.loads((tmp_path / "check.json").read_text())["holds"]


def test_the_command_refuses_what_cannot_be_checked(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    for arguments, message in (
        (["model", "--attention=flash"], "unknown attention 'flash'; "),
        (["nowhere"], "no such folder"),
        (["model", "--device=cuda:99"], "device 'cuda:99' cannot be used: "),
        (["model", "--device=gpu"], "unknown device 'gpu'"),
    ):
        done = check(tmp_path / arguments[0], *arguments[1:])
        assert done.exit_code == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
