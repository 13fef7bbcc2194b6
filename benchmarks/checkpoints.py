"""What checkpoints cost a run: a 124M model on the CPU, trained by the package's own loop.

`python benchmarks/checkpoints.py` trains gpt2-small on text from the Python standard library and saves every few
steps, so that steps beside which a checkpoint is written and steps beside which none is take turns. A step is timed
from its begin to the begin of the next, with all that the loop does in between. It measures

1. the median step beside which nothing is written;
2. for each save how much longer the steps took, from the copy on until all was on the disk, than as many of those
   before and after it;
3. what that is of the time of a run that saves every 50 steps.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from gpt_kit_hf import EncodingOptions, ModelOptions, RunOptions, TextOptions, TrainingOptions, WindowOptions, train
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.storage.checkpoints import verify_checkpoint
from gpt_kit_hf.training.saving import RunCheckpoints
from gpt_kit_hf.training.state import checkpoint_writer as writer_room
from gpt_kit_hf.training.steps import Steps

EVERY = 50  # steps between the saves of the run that is asked about
WARM_UP = 2  # steps that allocate
TEXT_CHARACTERS = 600_000


@dataclass(kw_only=True)
class Times:
    """When steps began, when the loop stood still for a save, and when a checkpoint was written, in seconds."""

    steps: list[float] = field(default_factory=list)
    stops: list[tuple[float, float]] = field(default_factory=list)
    writes: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Save:
    """What one save took: the loop's standstill, the writing, and how much longer the steps took in all."""

    stop: float
    write: float
    steps_beside: int
    extra: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--save_steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--model", default="gpt2-small")
    parser.add_argument("--encoding", default="gpt2", help="which sets the vocabulary; gpt2 is 50,257 tokens")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--at-once", action="store_true", help="let the loop wait for each save")
    parser.add_argument("--folder", help="where the run lies; the temporary folder if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        benchmark(options, Path(folder))


def benchmark(options: argparse.Namespace, folder: Path) -> None:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    files = find_files(["python-stdlib"])
    text = "\n".join(file.read_text("utf-8", "ignore") for file in files)
    (folder / "text.txt").write_text(text[:TEXT_CHARACTERS])
    (folder / "held-out.txt").write_text(text[-10 * options.context :])  # what is not timed shall be short
    times = Times()
    with noted(times):
        train(run_options(options, folder), stream=None)
    checkpoints = sorted((folder / "run/checkpoints").iterdir())
    assert not any(verify_checkpoint(checkpoint) for checkpoint in checkpoints)
    size = sum(file.stat().st_size for file in checkpoints[-1].iterdir())
    captured = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    captured |= {"python": platform.python_version(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    what = f"{options.model}, {options.batch} x {options.context} tokens a step, {options.precision}"
    print(f"{captured}, {processor()}\n{what}, {size:,} bytes a save")
    report(times)


def run_options(options: argparse.Namespace, folder: Path) -> RunOptions:
    return RunOptions(
        training=TrainingOptions(
            output_dir=str(folder / "run"), batch_size=options.batch, max_steps=options.steps, eval_steps=10**6,
            sample_steps=0, sample_max_new_tokens=1, save_steps=options.save_steps,
            save_total_limit=1, use_cpu=True, report_to=["none"],
            mixed_precision=options.precision, async_save=not options.at_once,
        ),
        text=TextOptions(text_files=[str(folder / "text.txt")], eval_files=[str(folder / "held-out.txt")]),
        encoding=EncodingOptions(encoding=options.encoding),
        windows=WindowOptions(max_length=options.context),
        model=ModelOptions(model=options.model),
    )  # fmt: skip


@contextmanager
def noted(times: Times) -> Iterator[None]:
    """Note times where the run computes a step, saves, and writes; what they do stays the same."""
    take, save, write = Steps.take, RunCheckpoints.save, writer_room.save_checkpoint

    def timed(function: Callable[..., Any], spans: list[tuple[float, float]]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spans.append((began, time.perf_counter()))

        return call

    def begun(self: Steps) -> Any:
        times.steps.append(time.perf_counter())
        return take(self)

    Steps.take = begun  # type: ignore[method-assign]
    RunCheckpoints.save = timed(save, times.stops)  # type: ignore[method-assign]
    writer_room.save_checkpoint = timed(write, times.writes)
    try:
        yield
    finally:
        Steps.take, RunCheckpoints.save = take, save  # type: ignore[method-assign]
        writer_room.save_checkpoint = write


def saves_of(times: Times) -> tuple[list[Save], list[float]]:
    """Return what each save took, and the steps beside which nothing was written."""
    spans = [(stop[0], write[1]) for stop, write in zip(times.stops, times.writes, strict=True)]
    spans = [span for span in spans if span[1] < times.steps[-1]]  # those that all of their steps are timed of
    steps = list(zip(times.steps, times.steps[1:], strict=False))[WARM_UP:]

    def lengths(low: float, high: float, *, beside: bool) -> list[float]:
        """Return the steps that lie beside what was written in a time, or those in a time beside nothing."""
        if beside:
            return [end - begin for begin, end in steps if begin < high and end > low]
        free = [(b, e) for b, e in steps if not any(b < written and e > began for began, written in spans)]
        return [end - begin for begin, end in free if low <= begin and end <= high]

    saves = []
    for number, (began, written) in enumerate(spans):
        mine = lengths(began, written, beside=True)
        # Those between the save before and the one after: a machine that becomes slower does not count.
        before = spans[number - 1][1] if number else -math.inf
        after = spans[number + 1][0] if number + 1 < len(spans) else math.inf
        near = lengths(before, after, beside=False)
        if not near:
            sys.exit(f"save {number + 1} was still written when the next one began: raise --save_steps")
        extra = sum(mine) - len(mine) * statistics.median(near)
        stop, write = (end - begin for begin, end in (times.stops[number], times.writes[number]))
        saves.append(Save(stop=stop, write=write, steps_beside=len(mine), extra=extra))
    return saves, lengths(-math.inf, math.inf, beside=False)


def report(times: Times) -> None:
    saves, plain = saves_of(times)
    step = statistics.median(plain)
    print(f"{len(plain)} steps beside no save: median {step:.3f} s, from {min(plain):.3f} to {max(plain):.3f}")
    for save in saves:
        took = f"the loop stood still for {save.stop:.2f} s, written in {save.write:.2f} s beside {save.steps_beside}"
        share = save.extra / (EVERY * step)
        print(f"save: {took} steps, which took {save.extra:+.2f} s longer: {share:+.2%} of {EVERY} steps")
    extra = statistics.median(save.extra for save in saves)
    print(f"median of {len(saves)} saves: {extra:.2f} s; every {EVERY} steps that is {extra / (EVERY * step):.2%}")


def processor() -> str:
    """Return what the machine computes with, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


if __name__ == "__main__":
    sys.exit(main())
