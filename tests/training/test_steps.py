"""Steps that do not go as planned: memory that runs out, spikes, losses that are no numbers, disks that are full."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain import assert_same_run, options, text_file, update_lines  # noqa: F401

from gpt_kit_hf import AMPTrainer, NonFiniteError, train
from gpt_kit_hf.errors import RunError, StoppedError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.training.pretrain import PretrainingTask
from gpt_kit_hf.training.replay import replay_steps
from gpt_kit_hf.training.runtime.lost_processes import lost_process
from gpt_kit_hf.training.runtime.signals import StopSignals
from gpt_kit_hf.training.steps import Steps


@pytest.fixture(
    params=[
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def small_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds no more than two rows at once."""
    whole = AMPTrainer.update

    def update(self: AMPTrainer, parts: Any, **more: Any) -> Any:
        if max(len(part[0]) for part in parts) > 2:
            raise request.param
        return whole(self, parts, **more)

    monkeypatch.setattr(AMPTrainer, "update", update)


def test_the_next_batches_are_read_before_the_device_is_waited_for(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU they are read while it computes."""
    read, at_updates = [0], []
    batches, finish = PretrainingTask.batches, AMPTrainer._step

    def counted(*arguments: Any) -> Iterator[Batch]:
        for batch in batches(*arguments):
            read[0] += 1
            yield batch

    def step(*arguments: Any) -> Any:
        at_updates.append(read[0])
        return finish(*arguments)

    monkeypatch.setattr(PretrainingTask, "batches", counted)
    monkeypatch.setattr(AMPTrainer, "_step", step)
    train(options(tmp_path / "run", text_file), stream=None)
    assert at_updates == [2 * min(step + 1, 12) for step in range(1, 13)]  # two micro-batches a step


def test_a_run_that_was_taken_over_at_its_end_publishes_nothing(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the last evaluation had taken longer than the lease, while no renewal reached the file system."""
    run, lock = tmp_path / "run", tmp_path / "run" / "run.lock"
    another = json.dumps({"host": "elsewhere", "pid": 7, "id": "another", "lease": 90.0})

    def taken_over(self: PretrainingTask) -> dict[str, Any]:
        lock.write_text(another)
        return {}

    monkeypatch.setattr(PretrainingTask, "final_facts", taken_over)
    with pytest.raises(RunError, match="taken over by process 7 on elsewhere"):
        train(options(run, text_file), stream=None)
    assert lock.read_text() == another
    assert not list(run.glob("*.safetensors"))


def no_dropout(run: Any) -> Any:
    return replace(run, model=replace(run.model, dropout=0.0))


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    small_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.StringIO()
    train(no_dropout(options(tmp_path / "short", text_file, per_device_train_batch_size=6)), stream=output)
    assert output.getvalue().count("ran out of memory") == 2  # 6 rows, 3, then 2 and 1
    monkeypatch.undo()
    train(no_dropout(options(tmp_path / "whole", text_file, per_device_train_batch_size=6)), stream=None)
    for one, other in zip(update_lines(tmp_path / "short"), update_lines(tmp_path / "whole"), strict=True):
        assert one["batch"] == other["batch"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


@pytest.mark.parametrize("small_memory", [MemoryError()], indirect=True)
def test_halved_micro_batches_are_recorded_kept_on_resume_and_replayed(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    small_memory: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout, whose masks depend on them; there is memory enough when the run is resumed and replayed."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(options(whole, text_file, per_device_train_batch_size=6), stream=None)
    take = Steps.take
    monkeypatch.setattr(Steps, "take", lambda self: None if self.step == 6 else take(self))
    with pytest.raises(StoppedError):
        train(options(run, text_file, per_device_train_batch_size=6), stream=None)
    monkeypatch.undo()
    train(options(run, text_file, per_device_train_batch_size=6, resume=True), stream=None)
    assert_same_run(run, whole)
    sessions = [session["micro_batch_splits"] for session in load_json(run / "run.json")["sessions"]]
    assert sessions == [{"1": 4}, {"7": 4}]
    lines: list[str] = []
    replayed = replay_steps(run, 1, 12, log=lines.append)
    assert (replayed.difference, replayed.tolerance) == ("", 0.0), lines


def test_out_of_memory_stops_the_run_if_asked_to(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    small_memory: None,
) -> None:
    with pytest.raises(
        RunError, match=r"with micro-batches of 4: continue with --resume --per_device_train_batch_size 2"
    ):
        train(options(tmp_path / "run", text_file, out_of_memory="stop"), stream=None)


def test_spike_is_skipped_and_logged(text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    whole = AMPTrainer.update
    calls = []

    def update(self: AMPTrainer, parts: Any, **more: Any) -> Any:
        calls.append(more["spike_limit"])
        return whole(self, parts, **{**more, "spike_limit": 0.0 if len(calls) == 11 else more["spike_limit"]})

    monkeypatch.setattr(AMPTrainer, "update", update)
    output = io.StringIO()
    train(options(tmp_path / "run", text_file, spike_factor=10.0), stream=output)
    assert calls[:10] == [float("inf")] * 10
    norms = [line["grad_norm"] for line in update_lines(tmp_path / "run")]
    assert calls[10] == pytest.approx(10 * torch.tensor(norms[:10], dtype=torch.float64).quantile(0.5).item())
    assert "step 11 skipped, weights unchanged: gradient norm" in output.getvalue()


def test_non_finite_losses_stop_the_run_and_name_the_batch(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = AMPTrainer._step
    monkeypatch.setattr(
        AMPTrainer,
        "_step",
        lambda self, total, *rest: whole(self, total if self.calls() < 6 else total * math.nan, *rest),
    )
    count = iter(range(100))
    monkeypatch.setattr(AMPTrainer, "calls", lambda self: next(count), raising=False)
    with pytest.raises(
        NonFiniteError, match=r"last at step 9: loss is nan; its batch is \w{16}, samples \d+, .*step-0"
    ):
        train(options(tmp_path / "run", text_file, max_skipped_updates=3), stream=None)


def test_failed_save_keeps_the_run_and_the_old_checkpoint(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gpt_kit_hf.storage import checkpoints

    train(options(tmp_path / "whole", text_file), stream=None)
    whole, calls = checkpoints._write_manifest, []

    def once_full(stage: Path, step: int, known: Any) -> None:
        calls.append([folder.name for folder in list_checkpoints(tmp_path / "run")])
        if step == 8:
            raise OSError(28, "No space left on device")
        whole(stage, step, known)

    monkeypatch.setattr(checkpoints, "_write_manifest", once_full)
    output = io.StringIO()
    train(options(tmp_path / "run", text_file), stream=output)
    assert "the checkpoint of step 8 was not saved" in output.getvalue()
    assert "training continues" in output.getvalue()
    assert calls == [[], ["step-00000004"], ["step-00000004"]]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_stop_right_after_a_save_writes_and_reads_nothing_again(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gpt_kit_hf.storage import checkpoints

    hashed: list[str] = []
    digest_of = checkpoints.digest_of
    monkeypatch.setattr(checkpoints, "digest_of", lambda path: hashed.append(path.name) or digest_of(path))
    monkeypatch.setattr(StopSignals, "asked", lambda self: bool(list_checkpoints(tmp_path / "run")))
    with pytest.raises(StoppedError, match="after step 4 of 12, saved"):
        train(options(tmp_path / "run", text_file, async_save=False), stream=None)
    assert len(hashed) == len(set(hashed)) > 5


def test_background_saves_and_recomputation_change_no_bit(text_file: str, tmp_path: Path) -> None:  # noqa: F811
    saves: dict[str, Any] = {"save_steps": 1, "keep_best": 2}
    train(options(tmp_path / "one", text_file, async_save=True, **saves), stream=None)
    train(options(tmp_path / "other", text_file, async_save=False, gradient_checkpointing=True, **saves), stream=None)
    assert_same_run(tmp_path / "one", tmp_path / "other")
    # Its tensors alone, twice: tied weights are written once.
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert a == b


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.distributed.DistNetworkError("The server socket has failed"), "another process of the run"),
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
            "another process",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a process that loads batches ended",
        ),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), None),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_lost_process_is_told_from_other_errors(error: RuntimeError, reason: str | None) -> None:
    found = lost_process(error)
    assert found is None if reason is None else (found is not None and found.startswith(reason))
