"""The package's whole training loop beside its bare step and beside transformers' Trainer.

`python benchmarks/loop.py` trains on the source of Python's standard library with the package's `train` (reading the
data, records, progress, a checkpoint in the middle), with its step alone on batches at hand, and with transformers'
Trainer on its GPT-2 of the same size, the same windows and precision, which saves in the middle, too. They take turns,
each in a process of its own; the first steps, which allocate, are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import measure
import peers
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from gpt_kit_hf import (
    AMPTrainer,
    Batch,
    EncodingOptions,
    ModelOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    WindowOptions,
    get_encoding,
    train,
)
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory
from gpt_kit_hf.training.steps import Steps

LEFT_OUT = 2  # steps that allocate
SAVE_EVERY = TrainingOptions.save_steps  # steps, and Trainer's default, too; here each saves once, in the middle
CHARACTERS = 3_000_000
BARE = "gpt_kit_hf, the step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=3)
    parser.add_argument("--shape", choices=peers.SHAPES, default="small")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--encoding", default="gpt2", help="which sets the vocabulary; gpt2 is 50,257 tokens")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=16, help="of each, each round")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.vocabulary = get_encoding(options.encoding).n_vocab
    if options.worker:
        work_alone(options)
        return
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                taken[name].append(measure.in_a_process("--worker", name, "--folder", folder))
    report(options, taken)


def work_alone(options: argparse.Namespace) -> None:
    """Take one way's steps, and print the seconds of one."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    text = "\n".join(file.read_text("utf-8", "ignore") for file in find_files(["python-stdlib"]))[:CHARACTERS]
    (options.folder / "text.txt").write_text(text)
    (options.folder / "held-out.txt").write_text(text[-10 * options.context :])
    ids = torch.tensor(get_encoding(options.encoding).encode_ordinary(text))
    windows = ids[: len(ids) // options.context * options.context].view(-1, options.context)
    print(json.dumps(WAYS[options.worker](options, peers.work_of(options), windows)))


def steps_of(begins: Sequence[float]) -> dict[str, float]:
    """Return the median seconds of a step behind the first ones, and what all of them took above that: the save."""
    seconds = [after - before for before, after in itertools.pairwise(begins[LEFT_OUT:])]
    step = statistics.median(seconds)
    return {"step": step, "save": sum(seconds) - len(seconds) * step}


def report(options: argparse.Namespace, taken: dict[str, list[dict[str, float]]]) -> None:
    work = peers.work_of(options)
    print(f"machine  {measure.machine(work.device)}; {measure.versions('torch', 'transformers', 'accelerate')}")
    print(f"work     {work}")
    # A bare step saves nothing: what its steps took above their median is chance.
    seconds = {
        name: [turn["step"] + (turn["save"] / SAVE_EVERY if name != BARE else 0.0) for turn in turns]
        for name, turns in taken.items()
    }
    loop = next(iter(WAYS))
    rows = [
        [
            name,
            f"{statistics.median(turn['step'] for turn in taken[name]):.3f} s",
            "" if name == BARE else f"{statistics.median(turn['save'] for turn in taken[name]):.1f} s",
            f"{work.tokens / statistics.median(s):,.0f}",
            f"{measure.median_ratio(s, seconds[loop]):.2f}",
        ]
        for name, s in seconds.items()
    ]
    measure.show(rows, ["", "a step", "a save", f"tokens/s, a save every {SAVE_EVERY} steps", "time to the loop's"])
    print(f"of the loop's time {statistics.median(turn['updating'] for turn in taken[loop]):.1%} are its updates")
    measure.keep(options.json, {"options": vars(options) | {"folder": None}, "turns": taken})


def our_loop(options: argparse.Namespace, work: peers.Work, _: torch.Tensor) -> dict[str, float]:
    """Train with all defaults; return the seconds of its steps, and which share of them is the trainer's update."""
    begins: list[float] = []
    updates: list[float] = []
    take, update = Steps.take, AMPTrainer.update

    def noted(self: Steps) -> Any:
        measure.synchronise(work.device)
        begins.append(time.perf_counter())
        return take(self)

    def timed(self: AMPTrainer, *arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        result = update(self, *arguments, **more)
        measure.synchronise(work.device)
        updates.append(time.perf_counter() - began)
        return result

    run = RunOptions(
        training=TrainingOptions(
            output_dir=str(options.folder / "run"), batch_size=work.batch, max_steps=options.steps, eval_steps=10**6,
            sample_steps=0, sample_max_new_tokens=1, save_steps=options.steps // 2, use_cpu=work.device == "cpu",
            mixed_precision=options.precision, report_to=["none"],
        ),
        text=TextOptions(
            text_files=[str(options.folder / "text.txt")], eval_files=[str(options.folder / "held-out.txt")]
        ),
        encoding=EncodingOptions(encoding=options.encoding),
        windows=WindowOptions(max_length=work.context),
        model=ModelOptions(
            model="nano-s", n_layer=work.layers, n_embd=work.width, n_head=work.heads,
            max_position_embeddings=work.context,
        ),
    )  # fmt: skip
    Steps.take, AMPTrainer.update = noted, timed  # type: ignore[method-assign]
    train(run, stream=None)
    counted = begins[LEFT_OUT:]
    updating = sum(updates[LEFT_OUT : options.steps - 1]) / (counted[-1] - counted[0])
    return {**steps_of(begins), "updating": updating}


def our_step(options: argparse.Namespace, work: peers.Work, windows: torch.Tensor) -> dict[str, float]:
    """Update by batches that are at hand; return the seconds of a step."""
    if work.device == "cpu":
        reuse_freed_memory()  # as `gpt-kit train` does
    trainer = peers.our_trainer(work)
    begins = []
    for number in range(options.steps):
        ids = windows[number * work.batch : (number + 1) * work.batch]
        measure.synchronise(work.device)
        begins.append(time.perf_counter())
        trainer.update([Batch(ids, ids.roll(-1, dims=1))])
    return steps_of(begins)


class Begins(TrainerCallback):
    """Notes when steps begin."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        measure.synchronise(self.device)
        self.times.append(time.perf_counter())


def their_loop(options: argparse.Namespace, work: peers.Work, windows: torch.Tensor) -> dict[str, float]:
    """Train GPT-2 with transformers' Trainer; return the seconds of a step."""
    gpt2 = peers.gpt2_of(peers.our_model(work)).train()
    rows = [{"input_ids": row, "labels": row} for row in windows]
    begins = Begins(work.device)
    arguments = TrainingArguments(
        output_dir=str(options.folder), per_device_train_batch_size=work.batch, max_steps=options.steps,
        learning_rate=1e-3, optim="adamw_torch_fused", weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=100,
        max_grad_norm=1.0, logging_steps=50, save_steps=options.steps // 2, report_to=[], disable_tqdm=True,
        use_cpu=work.device == "cpu", bf16=options.precision == "bf16",
    )  # fmt: skip
    Trainer(model=gpt2, args=arguments, train_dataset=rows, callbacks=[begins]).train()
    return steps_of(begins.times)


WAYS: dict[str, Callable[..., dict[str, float]]] = {
    "gpt_kit_hf, the loop": our_loop,
    BARE: our_step,
    "transformers Trainer": their_loop,
}


if __name__ == "__main__":
    main()
