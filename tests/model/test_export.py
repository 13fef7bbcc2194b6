"""Graphs that leave Python: torch.export, transformers' recipes for a cache, and ONNX on its own runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from shapes import SHAPES
from test_backends import continuation, lively_model
from test_modeling import TABLE, left_padded, packed, random_ids, relative_difference, right_padded
from torch import Tensor
from torch.export import Dim
from transformers import DynamicCache, GenerationConfig
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    convert_and_export_with_cache,
)

from gpt_kit_hf import GPTKitForCausalLM

# Two kernels of float32 differ by rounding only; a wrong position or mask moves these logits by more than 0.1.
TOLERANCE = 1e-5

# transformers notes in a global which outputs are being collected, and torch says that it saw that.
SIDE_EFFECTS = "ignore:While compiling, we found certain side effects happened in the model.forward:UserWarning"
# torch's converter to ONNX: about torch's own trees, and that two inputs share their axes, as they should.
TREES = r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
SHARED_AXES = "ignore:# The axis name. (batch|length) will not be used, since it shares:UserWarning"

Arrangement = Callable[[list[Tensor]], tuple[dict[str, Tensor], list[tuple[int, slice]]]]


def side_by_side(rows: list[Tensor]) -> tuple[dict[str, Tensor], list[tuple[int, slice]]]:
    """Rows of one length in a batch, without a mask."""
    shortest = min(map(len, rows))
    return {"input_ids": torch.stack([row[:shortest] for row in rows])}, [
        (index, slice(0, shortest)) for index in range(len(rows))
    ]


def packed_then_padded(rows: list[Tensor]) -> tuple[dict[str, Tensor], list[tuple[int, slice]]]:
    """All rows in one, then padding: what keeps them apart is ours, where transformers sees the mask only."""
    return packed(rows, (0,) * len(rows) + (3,))


def batches(arrangement: Arrangement) -> list[tuple[dict[str, Tensor], list[tuple[int, slice]], list[Tensor]]]:
    """Inputs of many shapes, from one token to as many as the table has."""
    found = []
    for lengths in ((5, 9, 3), (1,), (2,), (4, 4), (TABLE,), (1, TABLE, 7, 2, 11)):
        rows = [random_ids(length) for length in lengths]
        inputs, places = arrangement(rows)
        if inputs["input_ids"].shape[1] <= longest(arrangement):
            found.append((inputs, places, rows))
    return found


def longest(arrangement: Arrangement) -> int:
    """The most tokens of a row: packed documents together may have more than the table."""
    return TABLE if arrangement in (side_by_side, left_padded, right_padded) else 2 * TABLE


def dynamic_shapes(inputs: dict[str, Tensor], arrangement: Arrangement) -> dict[str, Any]:
    """Any batch and any length; packed rows come one at a time."""
    axes: dict[int, Any] = {1: Dim("length", min=1, max=longest(arrangement))}
    if "position_ids" not in inputs:
        axes[0] = Dim("batch", min=1, max=64)
    return dict.fromkeys(inputs, axes)


def frozen(*args: Any, **overrides: Any) -> GPTKitForCausalLM:
    """A model as one exports it: without gradients, and without the cache that would be one more output."""
    model = lively_model(*args, **overrides)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def export(model: GPTKitForCausalLM, arrangement: Arrangement, **options: Any) -> torch.export.ExportedProgram:
    inputs, _ = arrangement([random_ids(4), random_ids(7)])
    return torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes(inputs, arrangement), **options)


def check_rows(run: Callable[..., Tensor], model: GPTKitForCausalLM, arrangement: Arrangement) -> None:
    """The logits of `run` are those of each row alone, in the model itself, in eager mode."""
    if arrangement is left_padded:
        check_rows(run, model, right_padded)
    for inputs, places, rows in batches(arrangement):
        logits = run(**inputs)
        assert torch.isfinite(logits).all()
        for (index, place), row in zip(places, rows, strict=True):
            expected = model(row[None, : place.stop - place.start]).logits[0]
            assert relative_difference(logits[index, place], expected) <= TOLERANCE


def check_unchanged(model: GPTKitForCausalLM) -> None:
    """An export leaves the model as it was: it still looks at its ids, and still generates."""
    for bad in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match="input_ids must lie between 0 and"):
            model(torch.tensor([[1, bad]]))
    row = random_ids(5)
    generated = model.generate(row[None], attention_mask=row[None] * 0 + 1, max_new_tokens=12, do_sample=False)
    assert generated[0, 5:].tolist() == continuation(model, row)


# --- torch.export


KINDS = [("sdpa", "learned"), ("eager", "sinusoidal"), ("sdpa", "modern")]


@pytest.mark.parametrize(
    ("kind", "arrangement"),
    [
        *((KINDS[0], arrangement) for arrangement in (side_by_side, left_padded)),
        pytest.param(KINDS[0], packed_then_padded, marks=pytest.mark.slow),
        pytest.param(KINDS[1], left_padded, marks=pytest.mark.slow),
        (KINDS[2], packed_then_padded),
        pytest.param(KINDS[2], left_padded, marks=pytest.mark.slow),
        pytest.param(KINDS[0], packed, marks=pytest.mark.slow),
        pytest.param(KINDS[1], packed_then_padded, marks=pytest.mark.slow),
    ],
)
def test_an_exported_graph_takes_batches_of_other_shapes(kind: tuple[str, str], arrangement: Arrangement) -> None:
    model = frozen(kind[0], **SHAPES[kind[1]])
    graph = export(model, arrangement).module()
    check_rows(lambda **inputs: graph(**inputs).logits, model, arrangement)
    check_unchanged(model)


@pytest.mark.slow
@pytest.mark.filterwarnings(SIDE_EFFECTS)
def test_a_graph_is_exported_by_the_bytecode_too() -> None:
    model = frozen()
    graph = export(model, left_padded, strict=True).module()
    check_rows(lambda **inputs: graph(**inputs).logits, model, left_padded)
    check_unchanged(model)


def test_an_exported_graph_refuses_more_than_the_table() -> None:
    graph = export(frozen(), side_by_side).module()
    with pytest.raises(AssertionError, match=f"<= {TABLE}"):
        graph(input_ids=random_ids(2, TABLE + 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_graph_is_the_graph(shape: str, tmp_path: Path) -> None:
    model = frozen(**SHAPES[shape])
    kept = copy.deepcopy(model)
    torch.export.save(export(model, left_padded), tmp_path / "model.pt2")
    for tensor in (*model.parameters(), *model.buffers()):  # the file must hold them all
        tensor.zero_()
    graph = torch.export.load(tmp_path / "model.pt2").module()
    check_rows(lambda **inputs: graph(**inputs).logits, kept, left_padded)


# --- with a cache in the graph


def static_model(*args: Any, **overrides: Any) -> GPTKitForCausalLM:
    model = lively_model(*args, **overrides)
    model.requires_grad_(False)
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": TABLE},
        max_new_tokens=12,
        do_sample=False,
    )
    return model


def step_by_step(graph: Any, row: Tensor, count: int) -> list[int]:
    """Greedy tokens of a graph that takes one token at a time and keeps the cache in its buffers.

    transformers' own loop for such graphs makes a new module for each token, which with torch 2.13 forgets the cache,
    its own models' too.
    """
    tokens: list[int] = row.tolist()
    for place in range(len(row) + count - 1):
        logits = graph(input_ids=torch.tensor([[tokens[place]]]), cache_position=torch.tensor([place]))
        if place >= len(row) - 1:
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(row) :]


@pytest.mark.filterwarnings(SIDE_EFFECTS)
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_a_graph_with_a_static_cache_generates_what_generate_does(kind: tuple[str, str]) -> None:
    model = static_model(kind[0], **SHAPES[kind[1]])
    graph = convert_and_export_with_cache(model).module()
    for row in (random_ids(6), random_ids(3)):  # the second overwrites the cache of the first
        generated = model.generate(row[None], attention_mask=row[None] * 0 + 1)[0, len(row) :].tolist()
        assert generated == continuation(model, row)
        assert step_by_step(graph, row, 12) == generated


def test_a_graph_with_a_static_cache_takes_a_prompt_at_once() -> None:
    model = static_model()
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=TABLE)
    length = Dim("length", max=TABLE - 1)
    program = recipe.export(
        input_ids=random_ids(1, 3),
        cache_position=torch.arange(3),
        dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
        strict=False,
    )
    graph = program.module()
    row = random_ids(1, 20)
    expected = model(row, use_cache=False).logits
    for stops in ((9, 10, 17, 20), (1, 20)):
        start = 0
        for stop in stops:
            logits = graph(input_ids=row[:, start:stop], cache_position=torch.arange(start, stop))
            assert relative_difference(logits, expected[:, start:stop]) <= TOLERANCE
            start = stop


def exported_stages(exporter: Any, config: Any, model: GPTKitForCausalLM) -> Any:
    """transformers' exporters: a graph for the prompt, one for a step, with the growing cache in and out of each."""
    pytest.importorskip("transformers.exporters.runners", reason="this transformers exports, but runs nothing")
    example = random_ids(2, 6)
    inputs = {"input_ids": example, "attention_mask": torch.ones_like(example)}
    return exporter.export_for_generation(model, inputs, config)


def check_generation(stages: dict[str, Any], model: GPTKitForCausalLM) -> None:
    rows = random_ids(3, 9)
    out = stages["prefill"](
        input_ids=rows,
        position_ids=torch.arange(9).expand(3, -1),
        past_key_values=DynamicCache(config=model.config),
    )
    tokens = [out.logits[:, -1].argmax(dim=-1, keepdim=True)]
    for place in range(9, 20):
        out = stages["decode"](
            input_ids=tokens[-1],
            position_ids=torch.full((3, 1), place),
            past_key_values=out.past_key_values,
        )
        tokens.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
    assert torch.cat(tokens, dim=1).tolist() == [continuation(model, row) for row in rows]
    check_unchanged(model)


@pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning:transformers.exporters")
# The exporter's module compiles a function of its own by it at import, in the older versions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transformers_exports_prompt_and_step() -> None:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    model = lively_model().requires_grad_(False)
    check_generation(exported_stages(DynamoExporter(), DynamoConfig(dynamic=True), model).runners, model)


@pytest.mark.slow
@pytest.mark.filterwarnings(TREES)
def test_transformers_exports_prompt_and_step_to_onnx(tmp_path: Path) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = lively_model().requires_grad_(False)
    exported = exported_stages(OnnxExporter(), OnnxConfig(dynamic=True), model)
    exported.save_pretrained(tmp_path)
    check_generation(type(exported).from_pretrained(tmp_path).runners, model)


# --- ONNX


def onnx_logits(model: GPTKitForCausalLM, arrangement: Arrangement, file: Path) -> Callable[..., Tensor]:
    inputs, _ = arrangement([random_ids(4), random_ids(7)])
    torch.onnx.export(
        model,
        (),
        file,
        kwargs=inputs,
        dynamic_shapes=dynamic_shapes(inputs, arrangement),
        input_names=list(inputs),
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [argument.name for argument in session.get_inputs()] == list(inputs)
    assert [argument.shape[:2] for argument in session.get_inputs()] == [
        [1 if "position_ids" in inputs else "batch", "length"] for _ in inputs
    ]

    def run(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {name: ids.numpy() for name, ids in inputs.items()})[0])

    return run


@pytest.mark.filterwarnings(TREES)
@pytest.mark.filterwarnings(SHARED_AXES)
@pytest.mark.parametrize(
    ("kind", "arrangement"),
    [
        (KINDS[2], left_padded),
        pytest.param(KINDS[0], left_padded, marks=pytest.mark.slow),
        pytest.param(KINDS[1], left_padded, marks=pytest.mark.slow),
        pytest.param(KINDS[0], side_by_side, marks=pytest.mark.slow),
        pytest.param(KINDS[0], packed, marks=pytest.mark.slow),
        pytest.param(KINDS[1], packed_then_padded, marks=pytest.mark.slow),
    ],
)
def test_the_onnx_runtime_gives_the_same_logits(
    kind: tuple[str, str], arrangement: Arrangement, tmp_path: Path
) -> None:
    model = frozen(kind[0], **SHAPES[kind[1]])
    check_rows(onnx_logits(model, arrangement, tmp_path / "model.onnx"), model, arrangement)
    check_unchanged(model)
