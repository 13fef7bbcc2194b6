"""Whole runs by several processes, with DDP and with FSDP2, against those of one: the same batches and losses."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from programs import write_rotated
from ranks import run_ranks
from safetensors.torch import load_file
from test_pretrain import LINES, killed_copy, options, update_lines
from test_sharded_run import sharding
from tiny_model import write_tiny_model

from gpt_kit_hf import OptimizerOptions, RunOptions, TextOptions, finetune, parse_finetune_options, train
from gpt_kit_hf.options.data import WindowOptions
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.training import start
from gpt_kit_hf.training.finetune import InstructionTask

KINDS, HOWS = ("packed", "streamed"), ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rotated(tmp_path_factory.mktemp("texts"), LINES, files=8, times=60)


def options_of(kind: str, folder: Path, texts: Path, **changes: Any) -> RunOptions:
    """Options of a run with Muon, two micro-batches in one process, and no dropout, which is seeded by process."""
    steps = {
        "batch_size": 8,
        "max_steps": 4,
        "eval_steps": 9,
        "save_steps": 2,
        "sample_steps": 0,
        "report_to": ["none"],
    }
    asked = options(folder, "unused", **{**steps, **changes})
    files = {"text_files": [str(texts / "*.txt")], "eval_files": [str(texts / "held.out")]}
    return replace(
        asked,
        text=TextOptions(**files, streaming=True, shuffle_windows=8) if kind == "streamed" else TextOptions(**files),
        windows=WindowOptions(max_length=16, packing=kind == "packed"),
        model=replace(asked.model, dropout=0.0),
        optimizer=OptimizerOptions(optimizer="muon", learning_rate=5e-3),
    )


def prepare(how: str, folder: Path, rank: int, world: int) -> None:
    """Make ready for the next run of this process: a run ends the process group."""
    create = start.create_accelerator
    if how == "fsdp2":
        start.create_accelerator = lambda **given: sharding(create(**given))
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
    if not dist.is_initialized():
        number = next(_STORES)
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}.store", rank=rank, world_size=world)


_STORES = itertools.count()


def run_in_each_way(rank: int, world: int, folder: Path, texts: Path, kinds: tuple[str, ...]) -> None:
    whole = start.create_accelerator
    for kind, how in itertools.product(kinds, HOWS):
        prepare(how, folder, rank, world)
        train(options_of(kind, folder / f"{kind}-{how}", texts), stream=None)
        start.create_accelerator = whole
    prepare("fsdp2", folder, rank, world)
    train(options_of("packed", folder / "bf16", texts, mixed_precision="bf16", sample_steps=2), stream=None)


def resume(rank: int, world: int, folder: Path, texts: Path) -> None:
    prepare("fsdp2", folder, rank, world)
    train(options_of("packed", folder, texts, resume=True), stream=None)


def adapt(run: Path, base: Path, *more: str) -> None:
    """Train an adapter for 4 steps on rows that are not packed, with a bias in the base and without dropout."""
    given = [f"--output_dir={run}", f"--rows={base.parent / 'rows.jsonl'}", f"--model_name_or_path={base}"]
    given += ["--lora_r=2", "--batch_size=4", "--max_steps=4", "--save_steps=2", "--sample_steps=2", "--eval_steps=2"]
    given += ["--use_cpu", "--mixed_precision=fp32", "--report_to=none", "--sample_max_new_tokens=4", "--dropout=0"]
    finetune(parse_finetune_options([*given, "--max_length=64", *more], prog="test"), stream=None)


def adapt_sharded(rank: int, world: int, run: Path, base: Path, *more: str) -> list[str]:
    """Return the types of the modules that FSDP2 gathers, each by itself."""
    from torch.distributed.fsdp import FSDPModule

    gathered = list[str]()

    def look(task: InstructionTask) -> dict[str, Any]:
        gathered.extend(type(module).__name__ for module in task.model.modules() if isinstance(module, FSDPModule))
        return {}

    InstructionTask.final_facts = look
    prepare("fsdp2", run.parent, rank, world)
    adapt(run, base, *more)
    return gathered


def assert_same(alone: Path, other: Path) -> None:
    for one, two in zip(update_lines(alone), update_lines(other), strict=True):
        assert [one[key] for key in ("step", "batch", "chain")] == [two[key] for key in ("step", "batch", "chain")]
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        train(options_of(kind, folder / kind, texts), stream=None)
    return folder


@pytest.mark.parametrize(
    ("world", "kinds"),
    [(2, KINDS), pytest.param(4, KINDS, marks=pytest.mark.slow), pytest.param(8, KINDS, marks=pytest.mark.slow)],
)
def test_processes_train_on_the_same_batches_as_one(
    world: int, kinds: tuple[str, ...], alone: Path, texts: Path, tmp_path: Path
) -> None:
    run_ranks(run_in_each_way, world, tmp_path, tmp_path, texts, kinds)
    for kind, how in itertools.product(kinds, HOWS):
        assert_same(alone / kind, tmp_path / f"{kind}-{how}")
    if world != 2:
        return
    # With weights that are gathered in bf16, also for evaluations and samples.
    losses = [[line["loss"] for line in update_lines(folder)] for folder in (alone / "packed", tmp_path / "bf16")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-2)
    assert losses[1] != losses[0]
    # Muon's sharded momentum, in one process and in another number of processes.
    assert (list_checkpoints(tmp_path / "packed-fsdp2")[-1] / "sharded").is_dir()
    for processes in (1, 4):
        resumed = killed_copy(tmp_path / "packed-fsdp2", tmp_path / f"resumed-{processes}", "step-00000004")
        if processes == 1:
            train(options_of("packed", resumed, texts, resume=True), stream=None)
        else:
            run_ranks(resume, processes, resumed, resumed, texts)
        assert_same(alone / "packed", resumed)


def test_an_adapter_on_a_sharded_base_is_that_of_one_process(tmp_path: Path) -> None:
    """It is saved alone, resumed to the bit, and published merged."""
    base, alone, run = (tmp_path / name for name in ("base", "alone", "run"))
    write_tiny_model(base)
    rows = [{"prompt": f"{n} and {n + 1} are", "completion": f" {2 * n + 1}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    adapt(alone, base)
    gathered, _ = run_ranks(adapt_sharded, 2, tmp_path / "ranks", run, base)
    assert gathered.count("FSDPTransformerBlock") == 1  # the model has one
    assert gathered[0] == "FSDPPeftModelForCausalLM"
    assert_same(alone, run)
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000002/adapter_model.safetensors"):
        one, other = load_file(alone / name), load_file(run / name)
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
        assert any(one[key].any() for key in one if "lora_B" in key)  # which begin with zeros
    one, other = (load_file(folder / "model.safetensors") for folder in (alone, run))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    configs = [load_json(folder / "adapter" / "adapter_config.json") for folder in (alone, run)]
    assert {**configs[0], "target_modules": sorted(configs[0]["target_modules"])} == {
        **configs[1],
        "target_modules": sorted(configs[1]["target_modules"]),
    }
    checkpoint = list_checkpoints(run)[-1]
    names = [name for file in checkpoint.rglob("*.safetensors") for name in load_file(file)]
    assert names
    assert all("lora_" in name for name in names), names  # nothing of the base

    resumed = killed_copy(run, tmp_path / "resumed", "step-00000004")
    run_ranks(adapt_sharded, 2, tmp_path / "again", resumed, base, "--resume")
    assert update_lines(resumed) == update_lines(run)
    again = list_checkpoints(resumed)[-1]
    assert again.name == checkpoint.name
    for name in ("adapter_model.safetensors", "training_state.json"):
        assert (again / name).read_bytes() == (checkpoint / name).read_bytes()
    assert (resumed / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
