"""Compiled blocks: a run has the same losses, and a machine that cannot compile logs the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_model
from torch import nn

from gpt_kit_hf import (
    AMPTrainer,
    BaseOptions,
    FinetuneOptions,
    GPTKitConfig,
    GPTKitForCausalLM,
    RowOptions,
    RunOptions,
    SupervisionOptions,
    TextOptions,
    TrainingOptions,
    UsageError,
    finetune,
    train,
)
from gpt_kit_hf.model.presets import create_model_config
from gpt_kit_hf.options.data import EncodingOptions, WindowOptions
from gpt_kit_hf.options.model import ModelOptions
from gpt_kit_hf.training.runtime import compilation
from gpt_kit_hf.training.runtime.compilation import compile_block, compile_blocks

CPU = torch.device("cpu")


def small_model() -> GPTKitForCausalLM:
    return GPTKitForCausalLM(GPTKitConfig(vocab_size=50, n_layer=2, n_head=2, n_embd=8, max_position_embeddings=16))


def compiled_blocks(model: nn.Module) -> int:
    return sum(module._compiled_call_impl is not None for module in model.modules())


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch.compile returns the function unchanged."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return monkeypatch


@pytest.mark.parametrize(
    ("wanted", "device", "blocks"), [(None, "cpu", 0), (None, "cuda", 2), (True, "cpu", 2), (False, "cuda", 0)]
)
def test_blocks_are_compiled_on_a_gpu_or_if_asked_for(
    wanted: bool | None, device: str, blocks: int, pretended: pytest.MonkeyPatch
) -> None:
    pretended.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    model, said = small_model(), list[str]()
    assert compile_blocks(model, wanted, torch.device(device), said.append) == (blocks > 0)
    assert compiled_blocks(model) == blocks
    assert said == []


def test_a_machine_that_cannot_compile_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: object) -> Any:
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nSet it")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model, said = small_model(), list[str]()
    assert not compile_blocks(model, True, CPU, said.append)
    assert said == ["note     not compiled: InvalidCxxCompiler: No working C++ compiler found"]
    assert compiled_blocks(model) == 0


def test_a_model_without_blocks_is_refused_if_it_was_asked_for(pretended: pytest.MonkeyPatch) -> None:
    model = small_model()
    pretended.setattr(model, "_no_split_modules", None)
    with pytest.raises(UsageError, match="torch_compile=true: GPTKitForCausalLM does not tell what its blocks are"):
        compile_blocks(model, True, CPU, print)
    assert not compile_blocks(model, None, torch.device("cuda"), print)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch itself
def test_training_is_compiled_for_its_own_sizes_although_other_ones_are_scored_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph for sizes that may change is slower, and its kernels are chosen for none of them."""
    graphs: list[tuple[bool, bool]] = []  # for training or not, with sizes that may change or not
    updating: list[bool] = []

    def note(graph: Any, inputs: list[Any]) -> Any:
        graphs.append((bool(updating), any(isinstance(each, torch.SymInt) for each in inputs)))
        return graph

    def noted(self: AMPTrainer, *args: Any, **kwargs: Any) -> Any:
        updating.append(True)
        try:
            return update(self, *args, **kwargs)
        finally:
            updating.clear()

    update, compile_module = AMPTrainer.update, nn.Module.compile
    monkeypatch.setattr(AMPTrainer, "update", noted)
    monkeypatch.setattr(compilation, "_why_not", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compile_module(module, backend=note))
    torch._dynamo.reset()
    write_tiny_model(tmp_path / "base", context=256)
    rows = {"train.json": ["Is 1 even?"] * 8, "eval.json": ["Why?", "Is 123 even, or is it odd?", "Is it so?", "No?"]}
    for name, questions in rows.items():
        asked = [{"instruction": question, "input": "", "output": "no"} for question in questions]
        (tmp_path / name).write_text(json.dumps(asked))
    options = FinetuneOptions(
        training=TrainingOptions(
            output_dir=str(tmp_path / "run"), torch_compile=True, max_steps=3, batch_size=2, eval_steps=2,
            sample_max_new_tokens=2, use_cpu=True, mixed_precision="fp32", report_to=["none"],
        ),
        base=BaseOptions(model_name_or_path=str(tmp_path / "base"), eval_rows=[str(tmp_path / "eval.json")]),
        rows=RowOptions(rows=[str(tmp_path / "train.json")]),
        supervision=SupervisionOptions(max_length=256, packing=False),
    )  # fmt: skip
    finetune(options, stream=None)
    assert {changes for trains, changes in graphs if trains} == {False}
    assert (False, True) in graphs  # the rows that are scored have several sizes


@pytest.mark.slow  # torch's compiler takes half a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch itself
def test_a_compiled_run_has_the_losses_of_one_that_is_not(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    losses = {}
    for compiled in (True, False):
        run = tmp_path / str(compiled)
        options = RunOptions(
            training=TrainingOptions(
                output_dir=str(run),
                torch_compile=compiled,
                max_steps=6,
                batch_size=4,
                report_to=["none"],
                logging_steps=1,
            ),
            text=TextOptions(text_files=[str(text)], eval_fraction=0.2),
            encoding=EncodingOptions(encoding="bytes"),
            windows=WindowOptions(max_length=32),
            model=ModelOptions(model="nano-xs", n_layer=2, n_head=2, n_embd=16, max_position_embeddings=32),
        )
        losses[compiled] = train(options, stream=None).evaluation.loss
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


@pytest.mark.parametrize(
    ("capability", "device", "bits"),
    [("AVX512", "cpu", 256), ("AVX2", "cpu", 0), ("DEFAULT", "cpu", 0), ("AVX512", "cuda", 0)],
)
def test_only_the_widest_vectors_are_made_narrower(
    capability: str, device: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *, options: chosen.append(options))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    compile_block(nn.Linear(2, 2), torch.device(device))
    assert chosen == [{"cpp.simdlen": bits} if bits else None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch itself
def test_compiled_dropout_has_gradients_in_bf16() -> None:
    """Where a CPU has vectors of 512 bits, torch 2.13's code for them gives gradients of keys that are NaN."""
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 256, "vocab_size": 258}
    model = GPTKitForCausalLM(create_model_config("modern-xs", **shape, dropout=0.1)).train()
    compile_block(model.model.layers[0], CPU)
    ids = torch.randint(258, (8, 256))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: weights.grad for name, weights in model.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
