"""What a run says that it takes before its first step, what it refuses then, and that this changes nothing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_finetune import base, write_rows  # noqa: F401
from test_finetune import options as finetune_options
from test_pretrain import assert_same_run, options, text_file, update_lines  # noqa: F401

from gpt_kit_hf import AdapterOptions, SupervisionOptions, UsageError, finetune, train
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.instructions.batches import PackedRows
from gpt_kit_hf.data.order import BatchPlan
from gpt_kit_hf.options.training import Intervals
from gpt_kit_hf.storage.atomic_files import load_json
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.training.finetune import InstructionTask
from gpt_kit_hf.training.needs.cost import Probe
from gpt_kit_hf.training.needs.due import Due
from gpt_kit_hf.training.needs.run_needs import RunNeeds, _Measurement
from gpt_kit_hf.training.replay import replay_steps

NONE = RunNeeds(
    seconds=None, step_seconds=None, memory_bytes=0, free_memory_bytes=None, processes=1, disk_bytes=0,
    checkpoint_bytes=0, free_disk_bytes=1, splits=1,
)  # fmt: skip
GB = 10**9


@pytest.fixture
def a_gigabyte_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that take 1 GB a row."""
    passes, compute = [0], Probe._pass

    def pass_(self: Probe, batch: Any) -> None:
        passes.append(len(batch.input_ids))
        compute(self, batch)

    monkeypatch.setattr(Probe, "_pass", pass_)
    monkeypatch.setattr("gpt_kit_hf.training.needs.cost._Gauge._peak_before", 0, raising=False)
    monkeypatch.setattr(
        "gpt_kit_hf.training.needs.cost._Gauge.forget", lambda self: passes.__setitem__(slice(1, None), [])
    )
    monkeypatch.setattr("gpt_kit_hf.training.needs.cost._Gauge.risen", lambda self: GB * max(passes))


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[_Measurement]:
    """The measurements of all runs so far."""
    found: list[_Measurement] = []
    measured = _Measurement.needs

    def needs(self: _Measurement) -> RunNeeds:
        found.append(self)
        return measured(self)

    monkeypatch.setattr(_Measurement, "needs", needs)
    return found


def with_memory(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_kit_hf.training.needs.run_needs.memory_left", lambda device: int(size))


@pytest.mark.parametrize("steps", [12, 24], ids=["short", "timed"])
def test_a_run_is_the_same_without_the_measurement(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured, bare = (options(tmp_path / name, text_file, max_steps=steps) for name in ("measured", "bare"))
    train(measured, stream=None)
    monkeypatch.setattr("gpt_kit_hf.training.loop.measure_needs", lambda *_: NONE)
    train(bare, stream=None)
    assert_same_run(tmp_path / "measured", tmp_path / "bare")
    needs = load_json(tmp_path / "measured" / "run.json")["needs"]
    assert (needs["seconds"] is not None) == (needs["step_seconds"] is not None) == (steps == 24)


@pytest.mark.parametrize("rank", [0, 4], ids=["in full", "LoRA"])
def test_finetuning_is_the_same_without_the_measurement(
    rank: int,
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = write_rows(tmp_path / "rows.json")
    adapter = AdapterOptions(lora_r=rank, lora_dropout=0.1 if rank else 0.0)
    runs = [finetune_options(tmp_path / name, base, rows, max_steps=20, adapter=adapter) for name in "ab"]
    output = io.StringIO()
    finetune(runs[0], stream=output)
    monkeypatch.setattr("gpt_kit_hf.training.loop.measure_needs", lambda *_: NONE)
    finetune(runs[1], stream=None)
    if not rank:
        assert_same_run(tmp_path / "a", tmp_path / "b")
    assert update_lines(tmp_path / "a") == update_lines(tmp_path / "b")
    (line,) = (line for line in output.getvalue().splitlines() if line.startswith("needs"))
    assert line.startswith("needs    about ")
    needs = load_json(tmp_path / "a" / "run.json")["needs"]
    checkpoint = list_checkpoints(tmp_path / "a")[-1]
    written = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert needs["checkpoint_bytes"] == pytest.approx(written, rel=0.05, abs=8000)  # the header of a file
    # Five are due, and all of them are kept; the model is copied, that of an adapter once more.
    model = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert needs["disk_bytes"] == pytest.approx(5 * written + (2 if rank else 1) * model, rel=0.05, abs=50_000)


def test_the_needs_are_an_event_and_in_run_json(
    text_file: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    output = io.StringIO()
    train(options(tmp_path / "run", text_file, log_format="json"), stream=output)
    events = {event["event"]: event for event in map(json.loads, output.getvalue().splitlines())}
    needs = load_json(tmp_path / "run" / "run.json")["needs"]
    assert needs.items() <= events["needs"].items()
    assert needs["splits"] == 1
    assert 0 < needs["memory_bytes"] < needs["free_memory_bytes"]
    size = sum(file.stat().st_size for file in list_checkpoints(tmp_path / "run")[-1].glob("*.safetensors"))
    assert needs["checkpoint_bytes"] == pytest.approx(size, rel=0.05)


def test_memory_counts_what_the_process_held_before(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpt_kit_hf.training.needs.run_needs.peak_memory", lambda _: 7 * GB)
    train(options(tmp_path / "run", text_file), stream=None)
    assert load_json(tmp_path / "run" / "run.json")["needs"]["memory_bytes"] == 7 * GB


def test_micro_batches_that_do_not_fit_are_cut_at_once_kept_on_resume_and_replayed(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    a_gigabyte_a_row: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, whole, output = tmp_path / "run", tmp_path / "whole", io.StringIO()
    with_memory(2.5 * GB, monkeypatch)
    train(options(whole, text_file), stream=output)
    assert "note     micro-batches of 2 sequences instead of 4, which take 4.00 GB of memory" in output.getvalue()
    train(options(run, text_file, max_steps=6), stream=None)
    with_memory(99 * GB, monkeypatch)
    again = options(run, text_file, resume=True, allow_changes=["max_steps"])
    train(again, stream=None)
    sessions = [session["micro_batch_splits"] for session in load_json(run / "run.json")["sessions"]]
    assert sessions == [{"1": 2}, {"7": 2}]
    assert load_json(run / "run.json")["needs"]["splits"] == 2
    lines: list[str] = []
    replayed = replay_steps(whole, 1, 12, log=lines.append)
    assert (replayed.difference, replayed.tolerance) == ("", 0.0), lines


def test_what_does_not_fit_is_refused_before_anything_is_written(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    a_gigabyte_a_row: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with_memory(0.5 * GB, monkeypatch)
    with pytest.raises(UsageError, match=r"one sequence takes more memory than the 422 MB that .* lower max_length"):
        train(options(run, text_file), stream=None)
    with_memory(2.5 * GB, monkeypatch)
    with pytest.raises(UsageError, match=r"micro-batches of 4 .* 4\.00 GB .* 2\.24 GB .*_train_batch_size 2"):
        train(options(run, text_file, out_of_memory="stop"), stream=None)
    with_memory(99 * GB, monkeypatch)
    monkeypatch.setattr("gpt_kit_hf.training.needs.run_needs.disk_left", lambda folder: 10**6)
    with pytest.raises(UsageError, match=r"output_dir .* a checkpoint takes .* 1 MB are free there"):
        train(options(run, text_file), stream=None)
    assert not run.exists()
    with_memory(0.5 * GB, monkeypatch)
    line = (
        f"train --text_files {text_file} --encoding bytes --max_length 16 --output_dir {run} --use_cpu --max_steps 2"
    )
    shape = "--model modern-xs --n_layer 1 --n_head 2 --n_embd 16 --max_position_embeddings 16"
    capsys.readouterr()
    assert main([*line.split(), *shape.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not run.exists()


def test_less_disk_than_all_checkpoints_take_is_noted(
    text_file: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.StringIO()
    monkeypatch.setattr("gpt_kit_hf.training.needs.run_needs.SMALL_FILES_BYTES", 0)
    monkeypatch.setattr("gpt_kit_hf.training.needs.run_needs.disk_left", lambda folder: 700_000)
    train(options(tmp_path / "run", text_file), stream=output)
    assert "note     700 kB of disk are free: keep fewer checkpoints" in output.getvalue()


def test_the_rows_that_are_measured_are_the_longest_and_average_ones(
    base: Path,  # noqa: F811
    tmp_path: Path,
    measurements: list[_Measurement],
) -> None:
    rows = write_rows(tmp_path / "rows.json")
    many = json.loads(rows.read_text())
    many[3]["instruction"] *= 5
    rows.write_text(json.dumps(many))
    supervision = SupervisionOptions(max_length=256)
    for packing in (False, True):
        run = finetune_options(
            tmp_path / str(packing), base, rows, supervision=replace(supervision, packing=packing), max_steps=1
        )
        finetune(run, stream=None)
    padded, packed = (each._task for each in measurements)
    assert isinstance(padded, InstructionTask)
    assert isinstance(packed, InstructionTask)
    length = padded.dataset.batch_length
    assert padded.longest_rows(40).input_ids.shape == (40, length(range(len(padded.dataset))))
    plan = BatchPlan(order=padded.order, batch_size=6, micro_batch_size=3)
    each = [length(ids) for step in range(2, 34) for ids in plan.micro_batches(step)]
    found = padded.typical_rows(plan, 2, 2).input_ids
    assert len(found) == 2
    assert abs(found.shape[1] - sum(each) / len(each)) == min(abs(one - sum(each) / len(each)) for one in each)
    assert packed.longest_rows(3).input_ids.shape == (3, 256)
    assert packed.longest_rows(3).position_ids is not None


def test_kernels_of_other_sizes_of_batches_are_counted_in_bfloat16(
    base: Path,  # noqa: F811
    tmp_path: Path,
    measurements: list[_Measurement],
) -> None:
    rows = write_rows(tmp_path / "rows.json")
    for precision in ("fp32", "bf16"):
        run = finetune_options(tmp_path / precision, base, rows, mixed_precision=precision, max_steps=1)
        finetune(run, stream=None)
    exact, half = measurements
    task = half._task
    assert isinstance(task, InstructionTask)
    evaluated = task._evaluated(None, 1)
    assert {count for count, _ in evaluated} == {1}
    task.dataset = PackedRows(task.dataset.rows, 256)  # of one length
    whole = BatchPlan(order=task.order, batch_size=4, micro_batch_size=2)
    parts = BatchPlan(order=task.order, batch_size=5, micro_batch_size=2)  # the last one has a row
    of_evaluation = 4 * len(set(task._evaluated(None, 2)))
    assert task.more_kernels(whole) == of_evaluation + 60
    assert task.more_kernels(parts) == 12 + of_evaluation + 60
    half._kernels += 10
    assert half._beside(0) - exact._beside(0) == 800_000 * half._kernels
    assert exact._kernels == 0


@pytest.mark.parametrize("evaluates_saved", [False, True])
@pytest.mark.parametrize("every", [(5, 4, 0), (7, 7, 3), (100, 1, 50)])
def test_what_is_due_is_counted(every: tuple[int, int, int], evaluates_saved: bool) -> None:
    evaluation, saving, sample = every
    intervals = Intervals(evaluation=evaluation, saving=saving, logging=1, sample=sample)
    due = Due(every=intervals, total=30, eval_before_training=True, evaluates_saved=evaluates_saved)
    for done in (0, 4, 28, 29, 30):
        between = range(done + 1, 30)
        assert due.evaluations_after(done) == sum(map(due.evaluation, between))
        assert due.samples_after(done) == sum(map(due.sample, between))
        assert due.saves_after(done) == sum(map(due.saving, between)) + (done < 30)
