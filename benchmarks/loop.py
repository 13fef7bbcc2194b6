"""The package's whole training loop beside its bare step and beside transformers' Trainer.

`python benchmarks/loop.py` trains on the source of Python's standard library with the package's `train` (reading the
data, records, progress, a checkpoint in the middle), with its step alone on batches at hand, and with transformers'
Trainer on its GPT-2 of the same size, the same windows and precision, which saves in the middle, too. They take turns;
the first steps, which allocate, are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import measure
import peers
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from gpt_kit_hf import (
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
from gpt_kit_hf.run_steps import Steps
from gpt_kit_hf.text_sources import find_files

LEFT_OUT = 2  # steps that allocate
CHARACTERS = 3_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=3)
    parser.add_argument("--shape", choices=peers.SHAPES, default="small")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--encoding", default="gpt2", help="which sets the vocabulary; gpt2 is 50,257 tokens")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=16, help="of each, each round")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        benchmark(options, Path(folder))


def benchmark(options: argparse.Namespace, folder: Path) -> None:
    text = "\n".join(file.read_text("utf-8", "ignore") for file in find_files(["python-stdlib"]))[:CHARACTERS]
    (folder / "text.txt").write_text(text)
    (folder / "held-out.txt").write_text(text[-10 * options.context :])
    encoding = get_encoding(options.encoding)
    ids = torch.tensor(encoding.encode_ordinary(text))
    windows = ids[: len(ids) // options.context * options.context].view(-1, options.context)
    options.vocabulary = encoding.n_vocab
    work = peers.work_of(options)
    ways: dict[str, Callable[[int], list[float]]] = {
        "gpt_kit_hf, the loop": lambda turn: our_loop(options, work, folder / f"ours-{turn}"),
        "gpt_kit_hf, the step": lambda turn: our_step(options, work, windows),
        "transformers Trainer": lambda turn: their_loop(options, work, windows, folder / f"theirs-{turn}"),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        for name, way in ways.items():
            begins = way(turn)[LEFT_OUT:]
            taken[name].append((begins[-1] - begins[0]) / (len(begins) - 1))
    print(f"machine  {measure.machine(work.device)}; {measure.versions('torch', 'transformers', 'accelerate')}")
    print(f"work     {work}")
    ours = taken["gpt_kit_hf, the loop"]
    rows = [
        [
            name,
            f"{statistics.median(s):.3f} s",
            f"{work.tokens / statistics.median(s):,.0f}",
            f"{measure.median_ratio(s, ours):.2f}",
        ]
        for name, s in taken.items()
    ]
    measure.show(rows, ["", "a step", "tokens/s", "time to the loop's"])
    measure.keep(options.json, {"options": vars(options), "seconds": taken})


def our_loop(options: argparse.Namespace, work: peers.Work, folder: Path) -> list[float]:
    """Train with all defaults; return when each step began."""
    begins: list[float] = []
    take = Steps.take

    def noted(self: Steps) -> Any:
        measure.synchronise(work.device)
        begins.append(time.perf_counter())
        return take(self)

    run = RunOptions(
        training=TrainingOptions(
            output_dir=str(folder), batch_size=work.batch, max_steps=options.steps, eval_every=10**6,
            sample_every=0, sample_tokens=1, save_every=options.steps // 2, cpu=work.device == "cpu",
            mixed_precision=options.precision, report_to=["none"],
        ),
        text=TextOptions(
            text_files=[str(folder.parent / "text.txt")], eval_files=[str(folder.parent / "held-out.txt")]
        ),
        encoding=EncodingOptions(encoding=options.encoding),
        windows=WindowOptions(max_length=work.context),
        model=ModelOptions(
            model="nano-s", n_layer=work.layers, n_embd=work.width, n_head=work.heads,
            max_position_embeddings=work.context,
        ),
    )  # fmt: skip
    Steps.take = noted  # type: ignore[method-assign]
    try:
        train(run, stream=None)
    finally:
        Steps.take = take  # type: ignore[method-assign]
    return begins


def our_step(options: argparse.Namespace, work: peers.Work, windows: torch.Tensor) -> list[float]:
    """Update by batches that are at hand; return when each step began."""
    trainer = peers.our_trainer(work)
    begins = []
    for number in range(options.steps):
        ids = windows[number * work.batch : (number + 1) * work.batch]
        measure.synchronise(work.device)
        begins.append(time.perf_counter())
        trainer.update([Batch(ids, ids.roll(-1, dims=1))])
    return begins


class Begins(TrainerCallback):
    """Notes when steps begin."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        measure.synchronise(self.device)
        self.times.append(time.perf_counter())


def their_loop(options: argparse.Namespace, work: peers.Work, windows: torch.Tensor, folder: Path) -> list[float]:
    """Train GPT-2 with transformers' Trainer; return when each step began."""
    gpt2 = peers.gpt2_of(peers.our_model(work)).train()
    rows = [{"input_ids": row, "labels": row} for row in windows]
    begins = Begins(work.device)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=work.batch, max_steps=options.steps, learning_rate=1e-3,
        optim="adamw_torch_fused", weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=100, max_grad_norm=1.0,
        logging_steps=50, save_steps=options.steps // 2, report_to=[], disable_tqdm=True, use_cpu=work.device == "cpu",
        bf16=options.precision == "bf16",
    )  # fmt: skip
    Trainer(model=gpt2, args=arguments, train_dataset=rows, callbacks=[begins]).train()
    return begins.times


if __name__ == "__main__":
    main()
