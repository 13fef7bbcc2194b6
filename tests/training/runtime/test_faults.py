"""Faults injected into runs: after each a checkpoint loads, and the run continues or refuses in one line.

Each test is a row of the table that stands in pytest's report. Runs are real processes, ended by real signals, full
disks and altered bytes; what they come to is compared, to the bit, with a run that nothing happened to.
"""

from __future__ import annotations

import glob
import inspect
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import test_signals
import torch
from children import KILLED, die
from kill_campaign import Course, differences, write_texts
from kill_campaign import options as campaign_options
from safetensors.torch import load_file
from test_verify import flip
from torch.distributed import distributed_c10d
from transformers import AutoModelForCausalLM

from gpt_kit_hf import Batch, RunOptions, run_command, train
from gpt_kit_hf.storage.atomic_files import load_json, read_jsonl
from gpt_kit_hf.storage.checkpoints import checkpoint_step, latest_checkpoint, list_checkpoints
from gpt_kit_hf.training import text_task
from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED
from gpt_kit_hf.training.steps import Steps

STEPS = 8  # saved are 2, 4, 6 and 8; the newest two are kept
DISK = 44 << 20  # a save wants 32 MiB to be free, and its tensors
FAULT_OF_THE_PROGRAM = 99
CONTINUES = "continues, equal to the bit"
# A server that has imported everything and forks: a process that has computed something must not be forked.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "matplotlib.pyplot"])

_SHOWN = 130  # characters of a line

Inject = Callable[[], object]


# --- the table ------------------------------------------------------------------------------------------------


class Table:
    """Rows of what was injected and what came of it, shown at the end of pytest's report."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []

    def add(self, fault: str, injected: str, newest: str, then: str, captured: str = "") -> None:
        """Add a row; `captured` is the line that the run ended with."""
        quoted = f"{captured[:_SHOWN]!r}{'...' * (len(captured) > _SHOWN)}; " if captured else ""
        self.rows.append((fault, injected, newest, quoted + then))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        rows = [("fault", "injected by", "newest that loads", "then the run"), *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        terminalreporter.section("what faults leave of a run")
        for *cells, last in rows:
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            terminalreporter.write_line(" | ".join([*padded, last]))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Table:
    made = Table()
    request.config.pluginmanager.register(made)
    return made


# --- runs -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Attempt:
    """A process of a run, and what it captured."""

    process: BaseProcess
    captured: Path

    def ended(self) -> Attempt:
        self.process.join(120)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it goes on: {self.output}")
        return self

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.captured.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        return self.captured.with_suffix(".err").read_text()

    @property
    def refusal(self) -> str:
        """The one line that it ended with."""
        lines = self.errors.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


@dataclass(kw_only=True)
class Runs:
    """Runs on one text, in processes of their own."""

    base: Path
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def options(self, run: Path, processes: int = 1, **changes: Any) -> RunOptions:
        course = Course(processes=processes, workers=0, accumulation=1, stream=False)
        made = campaign_options(course, run, self.base / "texts")
        changes = {"max_steps": STEPS, "eval_steps": 100, "keep_best": 0, **changes}
        return replace(made, training=replace(made.training, **changes))

    def begin(self, options: RunOptions, inject: Inject | None = None, rank: int = 0, port: int = 0) -> Attempt:
        captured = self.base / f"attempt-{next(self.numbers)}"
        process = FORKS.Process(target=live, args=(options, inject, captured, self.base / "datasets", rank, port))
        process.start()
        return Attempt(process=process, captured=captured)

    def go(self, run: Path, inject: Inject | None = None, **changes: Any) -> Attempt:
        """Begin a run, or continue it, and wait for the end of the process."""
        return self.begin(self.options(run, **changes), inject).ended()

    def pair(self, run: Path, inject: Inject | None = None, *, of: int = 1) -> list[Attempt]:
        """Begin a run, or continue it, in two processes, and wait for both; `inject` is for one of them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = self.options(run, processes=2)
        both = [self.begin(options, inject if rank == of else None, rank, port) for rank in range(2)]
        return [attempt.ended() for attempt in both]


def live(options: RunOptions, inject: Inject | None, captured: Path, cache: Path, rank: int, port: int) -> None:
    """What the process of a run does: what the command does, with a fault injected before."""
    out, err = (captured.with_suffix(suffix).open("w", buffering=1) for suffix in (".out", ".err"))
    os.dup2(err.fileno(), 2)  # what is not Python speaks there, too
    sys.stderr = err
    os.environ["OMP_NUM_THREADS"] = "1"  # or Accelerate says that it sets it
    if port:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for loaders of batches
    datasets.config.HF_DATASETS_CACHE = cache
    if inject is not None:
        inject()
    try:
        code = run_command(lambda: train(options, stream=out))
    except Exception:
        traceback.print_exc(file=err)
        code = FAULT_OF_THE_PROGRAM
    sys.exit(code)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = tmp_path_factory.mktemp("faults")
    (base / "texts").mkdir()
    write_texts(base / "texts")
    with pytest.MonkeyPatch.context() as patch:
        # Of the server, which starts now. torch's C++ writes frames of its own where a connection ends.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        first = FORKS.Process(target=int)
        first.start()
        first.join()
    return Runs(base=base)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """A run that nothing happened to."""
    ended = runs.go(runs.base / "whole")
    assert ended.code == 0, ended.errors
    return runs.base / "whole"


@pytest.fixture(scope="module")
def killed(runs: Runs) -> Path:
    """A run that was killed in step 8, when step 6 was saved."""
    assert runs.go(runs.base / "killed", partial(before_step, STEPS, die), async_save=False).code == KILLED
    return runs.base / "killed"


def loadable(run: Path) -> Path:
    """Return the newest checkpoint that is whole, after loading its model as any model."""
    newest = latest_checkpoint(run, report=lambda line: None)
    assert newest is not None
    AutoModelForCausalLM.from_pretrained(newest)
    return newest


def continued(runs: Runs, run: Path, whole: Path, newest: Path) -> str:
    """Continue a run to its end, which must be that of the whole one; return how, for the table."""
    again = runs.go(run)
    assert again.code == 0, again.errors
    assert f"resumed  after step {checkpoint_step(newest)} ({newest.name})" in again.output
    assert differences(whole, run) == []
    return CONTINUES


# --- what is injected, in the process of the run --------------------------------------------------------------


def when(there: Path, act: Inject) -> None:
    """Act at the first thing that Python does after a file or folder, whose name may be a pattern, has come to be."""
    looking: list[str] = []

    def audit(event: str, _: tuple[object, ...]) -> None:
        if looking:
            return
        looking.append(event)  # looking raises events of its own
        if glob.glob(str(there)):  # noqa: PTH207
            act()
        else:
            looking.clear()

    sys.addaudithook(audit)


def before_step(step: int, act: Inject) -> None:
    """Act before a step is computed."""
    take = Steps.take

    def acting(self: Steps) -> Any:
        if self.step == step - 1:
            act()
        return take(self)

    Steps.take = acting  # type: ignore[method-assign]


def spoil(steps: range, alter: Callable[[Steps], Inject]) -> None:
    """Alter what some steps compute with; `alter` returns what takes it back."""
    take = Steps.take

    def altered(self: Steps) -> Any:
        undo = alter(self) if self.step + 1 in steps else lambda: None
        try:
            return take(self)
        finally:
            undo()

    Steps.take = altered  # type: ignore[method-assign]


def no_number(steps: Steps) -> Inject:
    """Make the model's last hidden states NaN, as an overflow does."""
    return steps.task.model.model.norm.register_forward_hook(lambda module, inputs, states: states * torch.nan).remove


def scaled_gradient(factor: float, steps: Steps) -> Inject:
    return steps.task.model.model.norm.weight.register_hook(lambda gradient: gradient * factor).remove


def other_batch(change: Callable[[Batch], Batch], steps: Steps) -> Inject:
    read, steps._next = steps._next, None  # in the step before
    assert read is not None
    first, *others = read.micro_batches
    steps._batches = itertools.chain([change(first), *others], steps._batches)
    return lambda: None


def unlabelled(batch: Batch) -> Batch:
    return batch._replace(targets=torch.full_like(batch.targets, -100))


def outside_the_vocabulary(batch: Batch) -> Batch:
    ids = batch.input_ids.clone()
    ids[0, 3] = 300
    return batch._replace(input_ids=ids)


def die_amid(stage: Path) -> None:
    """Let the kernel end the process where a file of a save would grow beyond some bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    when(stage, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))


def fill(disk: Path, left: int) -> None:
    """Fill a disk until it takes no more, then give so many bytes back."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            file.truncate(max(0, file.tell() - left))


def fill_for_a_while(disk: Path, left: int, until: int | None, unseen: bool) -> None:
    """Fill a disk before step 4, and free it before another; `unseen`, as if after the look at what is free."""
    if unseen:
        shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 40)  # type: ignore[assignment]
    before_step(4, lambda: fill(disk, left))
    if until is not None:
        before_step(until, (disk / "ballast").unlink)


def unreachable(steps: Steps) -> Inject:
    """Kill the loader of batches, and let fetching the tensors of a batch from it fail."""

    loader = steps._batches

    def batches() -> Iterator[Batch]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch would notice at once
        kill_a_worker()
        raise ConnectionResetError(104, "Connection reset by peer")
        yield from loader

    steps._batches = batches()
    return lambda: None


def stop_within(step: int) -> None:
    """Let a signal have come while a step was computed."""
    take = Steps.take

    def stopped(self: Steps) -> Any:
        report = take(self)
        return report if report is None or self.step != step else replace(report, stop=True)

    Steps.take = stopped  # type: ignore[method-assign]


def stop_at_the_start() -> None:
    """Send SIGTERM when the model is to be built."""
    text_task.build_config = lambda *arguments, **options: signal.raise_signal(signal.SIGTERM)  # type: ignore[assignment]


def kill_a_worker() -> None:
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)


def die_alone() -> None:
    """Die when the other process has found this one, and is about to talk to it."""
    distributed_c10d._new_process_group_helper = lambda *arguments, **options: die()


def wait_for(file: Path, captured: Path) -> None:
    captured.touch()
    while not file.exists():
        time.sleep(0.01)


# --- processes that are killed --------------------------------------------------------------------------------

# In the order in which a save writes them.
FILES = [
    "config.json", "chunked_loss.py", "configuration_gpt_kit.py", "modeling_gpt_kit.py", "packed_documents.py",
    "positions.py", "transformer_block.py",
    "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "optimizer.safetensors",
    "training_state.json", "manifest.json",
]  # fmt: skip
STAGE = "checkpoints/.stage-step-00000006-*"
KILLS = {
    **{f"kill at a save's {file}": (f"{STAGE}/{file}", "step-00000004") for file in FILES},
    "kill after a save's name is given": ("checkpoints/step-00000006", "step-00000006"),
    "kill as an old save is deleted": ("checkpoints/.trash-step-00000002", "step-00000006"),
}


def test_kills_hit_each_file_of_a_save(whole: Path) -> None:
    written = load_json(list_checkpoints(whole)[-1] / "manifest.json")["files"]
    assert sorted(FILES) == sorted([*written, "manifest.json"])


@pytest.mark.parametrize("fault", KILLS)
def test_a_kill_in_a_save(fault: str, runs: Runs, whole: Path, tmp_path: Path, table: Table) -> None:
    run, (place, expected) = tmp_path / "run", KILLS[fault]
    assert runs.go(run, partial(when, run / place, die)).code == KILLED
    newest = loadable(run)
    assert newest.name == expected
    table.add(fault, f"SIGKILL when {Path(place).name} is there", newest.name, continued(runs, run, whole, newest))


def test_a_kill_amid_the_bytes_of_a_file(runs: Runs, whole: Path, tmp_path: Path, table: Table) -> None:
    run = tmp_path / "run"
    assert runs.go(run, partial(die_amid, run / STAGE)).code == -signal.SIGXFSZ
    sizes = {path.name: path.stat().st_size for path in run.glob(f"{STAGE}/*")}
    assert max(sizes.values()) <= 60_000
    assert not sizes.keys() & {"tokenizer.json", "manifest.json"}
    newest = loadable(run)
    assert newest.name == "step-00000004"
    assert (newest / "model.safetensors").stat().st_size > 60_000
    then = continued(runs, run, whole, newest)
    table.add("kill amid model.safetensors", "SIGXFSZ at byte 60,000", newest.name, then)


@pytest.mark.parametrize(
    ("fault", "injected", "inject"),
    [
        ("dead worker", "SIGKILL to the loader of batches", partial(before_step, 6, kill_a_worker)),
        ("dead worker, seen late", "its socket is gone", partial(spoil, range(6, 7), unreachable)),
    ],
)
def test_a_dead_worker(
    fault: str, injected: str, inject: Inject, runs: Runs, whole: Path, tmp_path: Path, table: Table
) -> None:
    run = tmp_path / "run"
    ended = runs.go(run, inject, dataloader_num_workers=1)
    assert ended.code == 1
    assert ended.refusal.startswith("a process that loads batches ended (DataLoader worker")
    # torch says it at whatever moment: the save of step 4 may still be written beside the steps then, and step 6 is
    # computed if its batches were read before.
    left = r"the last checkpoint is step-0000000[246]"
    assert re.search(left + ": continue with --resume$", ended.refusal)
    newest = loadable(run)
    assert newest.name in ("step-00000002", "step-00000004", "step-00000006")
    table.add(fault, injected, newest.name, continued(runs, run, whole, newest), ended.refusal)


def test_a_dead_rank(runs: Runs, tmp_path: Path, table: Table) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [attempt.code for attempt in runs.pair(whole)] == [0, 0]
    first, second = runs.pair(run, partial(before_step, 6, die))
    assert (first.code, second.code) == (1, KILLED)
    assert "another process of the run does not answer" in first.refusal
    newest = loadable(run)
    assert newest.name == "step-00000004"
    table.add("dead rank", "SIGKILL to the second of 2", newest.name, "see the next row", first.refusal)
    first, second = runs.pair(run, die_alone, of=0)
    assert (first.code, second.code) == (KILLED, 1)
    assert second.refusal.startswith("another process of the run does not answer")
    assert loadable(run) == newest
    again = runs.pair(run)
    assert [attempt.code for attempt in again] == [0, 0]
    assert "resumed  after step 4" in again[0].output
    assert differences(whole, run) == []
    table.add("dead rank at the start", "SIGKILL to the first, continuing", newest.name, CONTINUES, second.refusal)


def test_a_run_that_was_taken_over(runs: Runs, whole: Path, tmp_path: Path, table: Table) -> None:
    """As if it had been paused, and a process of another host had waited for the end of its lease."""
    run = tmp_path / "run"
    another = {"host": "elsewhere", "pid": 7, "id": "another", "lease": 0.5}
    replaced = partial((run / "run.lock").write_text, json.dumps(another))
    ended = runs.go(run, partial(before_step, 6, replaced), async_save=False)
    assert ended.code == 1
    assert ended.refusal == (
        f"{run} was taken over by process 7 on elsewhere, as this one had not renewed its lease for 90 s: it stops "
        "and writes nothing more"
    )
    assert read_jsonl(run / "metrics.jsonl")[-1]["step"] == 5
    assert load_json(run / "run.lock") == another
    newest = loadable(run)
    assert newest.name == "step-00000004"
    table.add("taken over", "another's lock", newest.name, continued(runs, run, whole, newest), ended.refusal)


# --- processes that are asked to stop, or are one too many ----------------------------------------------------


def test_sigterm_before_the_first_step(runs: Runs, whole: Path, tmp_path: Path, table: Table) -> None:
    run = tmp_path / "run"
    ended = runs.go(run, stop_at_the_start)
    assert ended.code == EXIT_STOPPED
    assert ended.refusal == "stopped by SIGTERM before the first step"
    assert runs.go(run).code == 0
    assert differences(whole, run) == []
    table.add("SIGTERM at the start", "itself", "none", "begins again, equal to the bit", ended.refusal)


def test_a_stop_at_a_step_with_an_evaluation(runs: Runs, tmp_path: Path, table: Table) -> None:
    """The run that continues evaluates, so that the metrics are those of a run that did not stop."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert runs.go(whole, eval_steps=5).code == 0
    ended = runs.go(run, partial(stop_within, 5), eval_steps=5)
    assert ended.code == EXIT_STOPPED
    assert read_jsonl(run / "metrics.jsonl")[-1]["kind"] == "train"
    assert runs.go(run, eval_steps=5).code == 0
    assert differences(whole, run) == []
    table.add("a stop before an evaluation", "itself", "step-00000005", CONTINUES, ended.refusal)


def test_sigterm(runs: Runs, whole: Path, tmp_path: Path, table: Table) -> None:
    run = tmp_path / "run"
    ended = runs.go(run, partial(before_step, 6, partial(signal.raise_signal, signal.SIGTERM)))
    assert ended.code == EXIT_STOPPED
    assert ended.refusal == f"stopped by SIGTERM after step 5 of 8, saved in {run}: continue with --resume"
    newest = loadable(run)
    assert newest.name == "step-00000005"
    then, captured = continued(runs, run, whole, newest), ended.refusal.replace(str(run), "RUN")
    table.add("SIGTERM", "itself", newest.name, then, captured)


@pytest.mark.parametrize("launcher", test_signals.LAUNCHERS)
def test_sigterm_under_launchers_is_tested_elsewhere(launcher: str, table: Table) -> None:
    """Real launchers take ten seconds to start: no second time here."""
    test: Any = test_signals.test_a_launcher_that_is_stopped_leaves_no_orphan
    [parameters] = [mark.args[1] for mark in test.pytestmark if mark.args[0] == "launcher"]
    if launcher not in parameters:
        test = test_signals.test_a_run_that_is_stopped_saves_and_says_how_to_go_on
        assert f'begin("{launcher}"' in inspect.getsource(test)
    table.add(f"SIGTERM under {launcher}", f"test_signals.py::{test.__name__}", "that of the last step", "saved")


def test_a_second_writer(runs: Runs, whole: Path, tmp_path: Path, table: Table) -> None:
    run, go_on, there = tmp_path / "run", tmp_path / "go-on", tmp_path / "there"
    first = runs.begin(runs.options(run), partial(before_step, 6, partial(wait_for, go_on, there)))
    for _ in range(6000):
        if there.exists():
            break
        time.sleep(0.01)
    try:
        second = runs.go(run)
        newest = loadable(run)
    finally:
        go_on.touch()
    assert second.code == 1
    assert f"in use by process {first.process.pid}" in second.refusal
    assert first.ended().code == 0
    assert differences(whole, run) == []
    captured = second.refusal.replace(str(run), "RUN")
    table.add("second writer", "the same command again", newest.name, "the first ends equal to the bit", captured)


# --- disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    why = "there is no mount command"
    if shutil.which("mount"):
        why = subprocess.run(mount, capture_output=True, text=True, check=False).stderr.strip()
    if not os.path.ismount(place):
        pytest.skip(f"a small disk cannot be mounted ({why}): unshare --mount --map-root-user python -m pytest may")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("fault", "left", "unseen"),
    [("disk full before a save", 1 << 20, False), ("disk full amid a save", 1 << 16, True)],
)
def test_a_disk_that_is_full_for_a_while(
    fault: str, left: int, unseen: bool, runs: Runs, whole: Path, disk: Path, table: Table
) -> None:
    run = disk / "run"
    ended = runs.go(run, partial(fill_for_a_while, disk, left, 6, unseen), async_save=False)
    assert ended.code == 0, ended.errors
    reason = "No space left on device" if unseen else "free"
    [captured] = [line for line in ended.output.splitlines() if "the checkpoint of step 4 was not saved" in line]
    assert reason in captured
    assert "training continues" in captured
    assert differences(whole, run) == []
    table.add(fault, "ballast on a small tmpfs", loadable(run).name, "goes on, and ends equal to the bit")


def test_a_disk_that_stays_full(runs: Runs, whole: Path, disk: Path, table: Table) -> None:
    run = disk / "run"
    # Not in the background: on a busy machine the save of step 2 would meet the full disk, too.
    ended = runs.go(run, partial(fill_for_a_while, disk, 0, None, True), async_save=False)
    assert ended.code == 1
    assert "the checkpoint of step 8 was not saved" in ended.refusal
    newest = loadable(run)
    assert newest.name == "step-00000002"
    (disk / "ballast").unlink()
    then = continued(runs, run, whole, newest)
    table.add("disk full to the end", "ballast on a small tmpfs", newest.name, then, ended.refusal)


# --- bytes ----------------------------------------------------------------------------------------------------

NEWEST = "checkpoints/step-00000006"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in model.safetensors": (flip(f"{NEWEST}/model.safetensors"), "SHA-256 differs"),
    "flipped bit in optimizer.safetensors": (flip(f"{NEWEST}/optimizer.safetensors"), "SHA-256 differs"),
    "truncated model.safetensors": (lambda run: os.truncate(run / NEWEST / "model.safetensors", 999), "has 999 bytes"),
    "truncated manifest.json": (lambda run: os.truncate(run / NEWEST / "manifest.json", 100), "not valid JSON"),
    "deleted training_state.json": (lambda run: (run / NEWEST / "training_state.json").unlink(), "is missing"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_bytes_that_are_not_what_they_were(
    fault: str, runs: Runs, whole: Path, killed: Path, tmp_path: Path, table: Table
) -> None:
    run, (damage, reason) = Path(shutil.copytree(killed, tmp_path / "run")), DAMAGES[fault]
    assert loadable(run).name == "step-00000006"
    damage(run)
    captured: list[str] = []
    latest_checkpoint(run, report=captured.append)
    assert len(captured) == 1
    assert captured[0].startswith("step-00000006 is damaged and not used: ")
    assert reason in captured[0]
    newest = loadable(run)
    assert newest.name == "step-00000004"
    then = continued(runs, run, whole, newest)
    table.add(fault, "altered in a run that was killed", newest.name, then, captured[0])


# --- numbers --------------------------------------------------------------------------------------------------

BATCHES: dict[str, tuple[Callable[[Steps], Inject], str]] = {
    "NaN batch": (no_number, "loss is nan"),
    "batch with an infinite gradient": (partial(scaled_gradient, float("inf")), "gradient norm is "),
    "poisoned batch: a spike": (partial(scaled_gradient, 1e6), "is a spike"),
    "poisoned batch: no label": (partial(other_batch, unlabelled), "no trained token"),
}


@pytest.mark.parametrize("fault", BATCHES)
def test_a_batch_that_would_hurt_the_weights(fault: str, runs: Runs, tmp_path: Path, table: Table) -> None:
    run, (alter, reason) = tmp_path / "run", BATCHES[fault]
    changes = {"max_steps": 13, "save_steps": 1, "save_total_limit": 3, "spike_factor": 10.0}
    ended = runs.go(run, partial(spoil, range(12, 13), alter), **changes)
    assert ended.code == 0, ended.errors
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 14))
    assert [reason in line.get("skipped", "") for line in lines] == [False] * 11 + [True, False]
    assert "step 12 skipped, weights unchanged: " in ended.output
    before, after, last = list_checkpoints(run)
    for name in ("model.safetensors", "optimizer.safetensors"):
        old, new, newest = (load_file(folder / name) for folder in (before, after, last))
        assert all(torch.equal(old[key], new[key]) for key in old)
        assert all(tensor.isfinite().all() for tensor in newest.values())
        assert not all(torch.equal(old[key], newest[key]) for key in old)
    table.add(fault, "spoiled in step 12", loadable(run).name, f"skips it, {lines[11]['skipped']!r}, and goes on")


STOPPED_BY: dict[str, tuple[range, Callable[[Steps], Inject], int, str]] = {
    "NaN batches, two in a row": (
        range(7, 9), no_number, 1, "2 updates in a row were skipped, the last at step 8: loss is nan; its batch is "
    ),
    "poisoned batch: an unknown id": (
        range(8, 9), partial(other_batch, outside_the_vocabulary), 2,
        "step 8 cannot be computed: input_ids must lie between 0 and 257 (vocab_size=258), got 300; its samples are ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", STOPPED_BY)
def test_batches_that_stop_the_run(fault: str, runs: Runs, whole: Path, tmp_path: Path, table: Table) -> None:
    steps, alter, code, reason = STOPPED_BY[fault]
    run = tmp_path / "run"
    ended = runs.go(run, partial(spoil, steps, alter), max_skipped_updates=2)
    assert ended.code == code
    assert reason in ended.refusal
    assert ended.refusal.endswith("the last good checkpoint is step-00000006")
    newest = loadable(run)
    assert newest.name == "step-00000006"
    then = f"without the fault it {continued(runs, run, whole, newest)}"
    table.add(fault, f"spoiled from step {steps[0]} on", newest.name, then, ended.refusal)
