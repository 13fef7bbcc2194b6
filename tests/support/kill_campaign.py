"""Kill runs at random moments, again and again, and compare each with one that nobody killed.

    python tests/support/kill_campaign.py --kills 200        the long form; `make test` runs a short one

Every run is of real processes: one, or two that talk by gloo over loopback. A kill is SIGKILL to all processes or to
one rank only, at a random moment or in the middle of a save. A run is started again until it has had its share of
kills and reached its end; then its batches, losses, weights and optimizer must be those of the run that nobody killed,
to the bit. Ends with 1 if any is not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file

from gpt_kit_hf import (
    EncodingOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    WindowOptions,
    train,
)
from gpt_kit_hf.errors import GPTKitError
from gpt_kit_hf.storage.atomic_files import read_jsonl
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.training.verify import verify_run

_STEPS = 16
_FAILED = 3  # exit code of a process of a run that ended in one line
_PATIENCE = 60.0  # seconds that a process may live on after another of its run was killed


@dataclass(frozen=True, kw_only=True)
class Course:
    """One way to run."""

    processes: int
    workers: int
    accumulation: int
    stream: bool
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        source = "stream" if self.stream else "map"
        return f"{source}, {self.processes} processes, {self.workers} workers, {self.accumulation} micro-batches"


@dataclass(kw_only=True)
class Count:
    """What happened to the runs of a course."""

    kills: int = 0
    of_one_rank: int = 0
    in_a_save: int = 0
    attempts: int = 0
    faults: list[str] = field(default_factory=list)


def options(course: Course, folder: Path, texts: Path) -> RunOptions:
    """Return a run of few small steps, with dropout, that saves often."""
    share = 8 // course.processes
    training = TrainingOptions(
        output_dir=str(folder), resume=True, batch_size=8, per_device_train_batch_size=share // course.accumulation,
        max_steps=_STEPS, eval_steps=5, max_eval_samples=4, save_steps=2, save_total_limit=2, keep_best=1,
        logging_steps=100, sample_steps=0, report_to=["none"], dataloader_num_workers=course.workers, use_cpu=True,
        mixed_precision="fp32",
    )  # fmt: skip
    if course.stream:
        text = TextOptions(
            text_files=[str(texts / "part*.txt")],
            eval_files=[str(texts / "held-out.txt")],
            streaming=True,
            shuffle_windows=16,
        )
    else:
        text = TextOptions(text_files=[str(texts / "part*.txt")])
    return RunOptions(
        training=training,
        text=text,
        encoding=EncodingOptions(encoding="bytes"),
        windows=WindowOptions(max_length=32),
        model=ModelOptions(n_layer=2, n_head=2, n_embd=32, max_position_embeddings=32, dropout=0.2),
        optimizer=OptimizerOptions(learning_rate=3e-3, warmup_steps=3, optimizer=course.optimizer),
    )


def write_texts(folder: Path) -> None:
    """Write text of words drawn at random, in parts."""
    draw = random.Random(0)
    words = ["the", "a", "king", "fool", "ship", "sea", "crown", "storm", "loves", "sees", "old", "new", "and", "not"]
    for name in [*(f"part{n}.txt" for n in range(8)), "held-out.txt"]:
        (folder / name).write_text(" ".join(draw.choices(words, k=900)) + "\n")


def start(run: RunOptions, processes: int) -> list[int]:
    """Fork the processes of a run; return their numbers. They inherit what is imported, which takes long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sys.stdout.flush()
    return [_fork(run, rank, processes, port) for rank in range(processes)]


def _fork(run: RunOptions, rank: int, processes: int, port: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no thread of the parent has computed anything
        pid = os.fork()
    if pid:
        _codes.pop(pid, None)
        return pid
    code = _FAILED
    try:
        signal.set_wakeup_fd(-1)
        os.setpgid(0, 0)  # its loaders of batches die with it
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        train(run, stream=None)
        code = 0
    except (GPTKitError, SystemExit) as error:
        sys.stderr.write(f"{error}\n")
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# A process can be asked for its exit code once.
_codes: dict[int, int] = {}


def ended(pids: Sequence[int], patience: float) -> dict[int, int]:
    """Return the exit codes of those processes that have ended; wait so long for all."""
    until = time.monotonic() + patience
    while True:
        for pid in [pid for pid in pids if pid not in _codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                _codes[pid] = os.waitstatus_to_exitcode(status)
        codes = {pid: _codes[pid] for pid in pids if pid in _codes}
        if len(codes) == len(pids) or time.monotonic() > until:
            return codes
        time.sleep(0.002)


def kill(pids: Sequence[int]) -> None:
    """Kill processes and their loaders."""
    for pid in pids:
        for send in (os.killpg, os.kill):  # the group is not there yet in its first moment
            with suppress(ProcessLookupError):
                send(pid, signal.SIGKILL)


def attempt_and_kill(run: RunOptions, course: Course, count: Count, draw: random.Random, seconds: float) -> bool:
    """Start the run and kill it at some moment; return whether it came to its end before."""
    folder = Path(run.training.output_dir)
    before, written_before = leavings(folder), written(folder)
    pids = start(run, course.processes)
    count.attempts += 1
    in_a_save = draw.random() < 0.5
    until = time.monotonic() + draw.random() * seconds
    alive = True
    while alive and time.monotonic() < until + (seconds if in_a_save else 0):
        if in_a_save and any(folder.glob("checkpoints/.stage-*")):
            time.sleep(draw.random() * 0.02)
            break
        alive = not ended(pids, 0.0)
        time.sleep(0.0005)
    if not alive:
        return finish(pids, count)
    one_rank = course.processes > 1 and draw.random() < 0.5
    victims = [draw.choice(pids)] if one_rank else pids
    kill(victims)
    count.kills += 1
    count.of_one_rank += one_rank
    left = ended(pids, _PATIENCE)
    if len(left) < len(pids) and written(folder) == written_before:
        kill(pids)  # as a launcher does with those that still wait for the one to come
        ended(pids, _PATIENCE)
    elif len(left) < len(pids):
        count.faults.append("a process lived on after another was killed")
        kill(pids)
        ended(pids, _PATIENCE)
    elif any(code == 1 for code in left.values()):
        count.faults.append(f"a traceback after a kill: exit codes {left}")
    count.in_a_save += bool(leavings(folder) - before)
    return False


def written(run: Path) -> int:
    """Return the time of the last line of a run's metrics, 0 if there is none."""
    file = run / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else 0


def leavings(run: Path) -> set[tuple[str, int]]:
    """Return what killed saves have left: the folder in the making, or the one that was being deleted."""
    return {(path.name, path.stat().st_ctime_ns) for path in run.glob("checkpoints/.*")}


def finish(pids: Sequence[int], count: Count) -> bool:
    """Wait for the end of a run that nobody kills; return whether all its processes came to it."""
    codes = ended(pids, 10 * _PATIENCE)
    if len(codes) < len(pids) or any(codes.values()):
        count.faults.append(f"not finished: exit codes {codes}")
        kill(pids)
        return False
    return True


def differences(one: Path, other: Path) -> list[str]:
    """Return in what two runs differ: batches, losses, weights, optimizer, position; nothing if to the bit equal."""
    kept = [[checkpoint.name for checkpoint in list_checkpoints(run)] for run in (one, other)]
    return (["the checkpoints kept"] if kept[0] != kept[1] else []) + differences_at_the_end(one, other)


def differences_at_the_end(one: Path, other: Path) -> list[str]:
    """Return the same without the earlier checkpoints: a run that is asked to stop saves more often."""
    found = []
    lines = [[each for each in read_jsonl(run / "metrics.jsonl") if each["kind"] != "speed"] for run in (one, other)]
    if lines[0] != lines[1]:
        found.append("metrics.jsonl")
    last = [list_checkpoints(run)[-1] for run in (one, other)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / name) for folder in last)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            found.append(name)
    if len({(folder / "training_state.json").read_text() for folder in last}) > 1:
        found.append("training_state.json")
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("the model in the root")
    return found + verify_run(other).problems


def campaign(course: Course, kills: int, draw: random.Random, base: Path) -> Count:
    """Kill a run of the course so many times, let it end, and compare."""
    count, texts = Count(), base / "texts"
    folder = Path(tempfile.mkdtemp(dir=base))
    whole = options(course, folder / "whole", texts)
    began = time.monotonic()
    if not finish(start(whole, course.processes), count):
        return count
    seconds = time.monotonic() - began
    run = options(course, folder / "killed", texts)
    done = False
    while not done and count.kills < kills and count.attempts < 4 * kills:
        done = attempt_and_kill(run, course, count, draw, seconds)
        if done and count.kills < kills:  # it was quicker: the rest of the kills hits another run
            count.faults += differences(folder / "whole", folder / "killed")
            run = replace(run, training=replace(run.training, output_dir=tempfile.mkdtemp(dir=folder) + "/run"))
            done = False
    if not done and finish(start(run, course.processes), count):
        count.faults += differences(folder / "whole", Path(run.training.output_dir))
    return count


def all_courses() -> list[Course]:
    """Return every combination."""
    return [
        Course(processes=p, workers=w, accumulation=a, stream=s)
        for p, w, a, s in itertools.product((1, 2), (0, 2), (1, 4), (False, True))
    ]


def run_campaigns(courses: Sequence[Course], kills: int, seed: int, base: Path) -> dict[str, Count]:
    """Share the kills out to the courses; print a line for each."""
    datasets.config.HF_DATASETS_CACHE = base / "datasets"
    (base / "texts").mkdir()
    write_texts(base / "texts")
    counts = {}
    for number, course in enumerate(courses):
        share = kills // len(courses) + (number < kills % len(courses))
        counts[course.name] = count = campaign(course, share, random.Random(f"{seed} {number}"), base)
        sys.stdout.write(
            f"{course.name:50} {count.kills:3} kills, {count.of_one_rank:3} of one rank, {count.in_a_save:3} in a "
            f"save: {'; '.join(count.faults) or 'identical'}\n"
        )
        sys.stdout.flush()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--courses", type=int, help="so many of the 16 ways to run, evenly chosen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--json", type=Path, help="write the counts there")
    chosen = parser.parse_args()
    courses = [replace(course, optimizer=chosen.optimizer) for course in all_courses()]
    if chosen.courses:  # a step that is odd takes of everything
        courses = [courses[(number * 5) % len(courses)] for number in range(chosen.courses)]
    with tempfile.TemporaryDirectory() as base:
        counts = run_campaigns(courses, chosen.kills, chosen.seed, Path(base))
    totals = {name: sum(getattr(c, name) for c in counts.values()) for name in ("kills", "of_one_rank", "in_a_save")}
    faults = sum(len(count.faults) for count in counts.values())
    parts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in totals.items())
    sys.stdout.write(f"{parts}: {faults} faults\n")
    if chosen.json:
        chosen.json.write_text(json.dumps({name: vars(count) for name, count in counts.items()}, indent=1))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
