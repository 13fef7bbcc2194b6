"""A run of two processes that shard the model by FSDP2, from the first step to a resumed one."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_distributed import launch, metrics, text  # noqa: F401
from test_pretrain import killed_copy

from gpt_kit_hf import GPTKitForCausalLM, parse_run_options, run_command, train
from gpt_kit_hf.storage import checkpoints
from gpt_kit_hf.training import loop
from gpt_kit_hf.training.state import sharded_saves

WRITE_MANIFEST = checkpoints._write_manifest
WRITE_SHARDS = sharded_saves.write_sharded_optimizer


def sharding(accelerator: Accelerator) -> Accelerator:
    """Make Accelerate shard models on CPUs, as it does on GPUs only."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    # Both, as reading the first one of them resets it to the second.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def fail_at_step_4(stage: Path, step: int, known: Any) -> None:
    if step == 4:
        raise OSError(28, "No space left on device")
    WRITE_MANIFEST(stage, step, known)


def die_in_the_second_save(folder: Path, *arguments: Any) -> Any:
    if os.environ["RANK"] == "1" and "step-00000006" in str(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    return WRITE_SHARDS(folder, *arguments)


def losses(run: Path) -> list[Any]:
    return [line["loss"] for line in metrics(run)]


@pytest.mark.slow
def test_sharded_run_survives_a_failed_save_and_resumes(tmp_path: Path, text: Path) -> None:  # noqa: F811
    whole, run = tmp_path / "whole", tmp_path / "run"
    ended = launch(2, whole, text, "--sample_steps=4")
    assert ended.returncode == 0, ended.stderr
    ended = launch(2, run, text, "--sample_steps=4", script=__file__)
    assert ended.returncode == 0, ended.stderr
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)
    for folder in (run, run / "checkpoints" / "step-00000008"):
        assert (folder / "model.safetensors").stat().st_size == (whole / "model.safetensors").stat().st_size

    resumed = killed_copy(run, tmp_path / "resumed", "step-00000008")
    ended = launch(2, resumed, text, "--resume", script=__file__)
    assert ended.returncode == 0, ended.stderr
    assert "resumed  after step 4" in ended.stdout
    assert losses(resumed) == losses(run)

    shutil.rmtree(run)
    ended = launch(2, run, text, script=__file__, environment={"FAILS_AT_STEP_4": "1"})
    assert ended.returncode == 0, ended.stderr
    assert "the checkpoint of step 4 was not saved" in ended.stdout
    assert [folder.name for folder in checkpoints.list_checkpoints(run)] == ["step-00000008"]
    assert losses(run) == losses(resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        ["--optimizer=adamw"],
        ["--optimizer=muon"],
        ["--optimizer=muon", "--muon_beta2=0.9", "--ema_decay=0.9"],
    ],
    ids=["adamw", "muon", "normuon and average"],
)
def test_sharded_run_resumes_on_another_number_of_processes(chosen: list[str], tmp_path: Path, text: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    ended = launch(2, run, text, *chosen, script=__file__)
    assert ended.returncode == 0, ended.stderr
    checkpoint = run / "checkpoints" / "step-00000004"
    # Weights once, as a model folder; of the optimizer each process wrote its share, in the background.
    sizes = {path.name: path.stat().st_size for path in checkpoint.rglob("*.safetensors")}
    model = sizes.pop("model.safetensors")
    # Of a matrix Muon keeps one tensor, AdamW two, an average one more; and there are headers.
    least = (1 if "--optimizer=muon" in chosen else 2) + any("ema" in each for each in chosen)
    assert least * model < sum(sizes.values()) < (least + 1.2) * model
    assert GPTKitForCausalLM.from_pretrained(checkpoint).num_parameters() > 0
    for processes, script in ((1, "examples/pretrain.py"), (4, __file__)):
        resumed = killed_copy(run, tmp_path / f"by-{processes}", "step-00000008")
        ended = launch(processes, resumed, text, *chosen, "--resume", script=script)
        assert ended.returncode == 0, ended.stderr
        assert "resumed  after step 4" in ended.stdout
        assert losses(resumed) == pytest.approx(losses(run), abs=1e-4)
        assert [line.get("chain") for line in metrics(resumed)] == [line.get("chain") for line in metrics(run)]


@pytest.mark.slow
def test_a_process_that_dies_amid_a_save_leaves_the_checkpoint_before(tmp_path: Path, text: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    dies = {"DIES_IN_A_SAVE": "1"}
    ended = launch(2, run, text, "--save_steps=3", script=__file__, environment=dies)
    assert ended.returncode != 0
    assert [folder.name for folder in checkpoints.list_checkpoints(run)] == ["step-00000003"]
    ended = launch(2, run, text, "--save_steps=3", "--resume", script=__file__)
    assert ended.returncode == 0, ended.stderr
    assert "resumed  after step 3" in ended.stdout
    assert [folder.name for folder in (run / "checkpoints").iterdir() if folder.name.startswith(".")] == []


if __name__ == "__main__":
    unsharded = loop.run_accelerator
    loop.run_accelerator = lambda options: sharding(unsharded(options))
    if os.environ.get("FAILS_AT_STEP_4"):
        checkpoints._write_manifest = fail_at_step_4
    if os.environ.get("DIES_IN_A_SAVE"):
        sharded_saves.write_sharded_optimizer = die_in_the_second_save
    sys.exit(run_command(lambda: train(parse_run_options(sys.argv[1:], prog="test_sharded_run.py"))))
