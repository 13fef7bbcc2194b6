"""Steps that each recipe needs to reach an eval loss: tinyshakespeare by bytes, 4 layers of 256, context 128.

`python benchmarks/recipes.py TEXT` trains with `--recipe fast` and with AdamW and a cosine, tuned for itself, for each
seed, and prints the first step with an eval loss below the target, and the final loss. The time is
those steps times the time of a step, which is measured first, for both in turns: so the study may run beside other
work, and its parts one by one (`--recipes`, `--seeds`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch
from accelerate import Accelerator

from gpt_kit_hf import (
    AMPTrainer,
    Batch,
    EncodingOptions,
    GPTKitForCausalLM,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    WindowOptions,
    create_optimizer,
    train,
)
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.training import recipe_options

CONTEXT, BATCH, VOCABULARY = 128, 16, 257
MODEL = ModelOptions(model="nano-xs", n_layer=4, n_head=4, n_embd=256, max_position_embeddings=CONTEXT)
# Between the rates 2e-3 and 4e-3; with 1,000 steps 1e-3 ends at 1.774, 2e-3 at 1.708.
PLAIN = OptimizerOptions(learning_rate=2.5e-3, lr_scheduler_type="cosine", min_lr_ratio=0.02, warmup_steps=60)
RECIPES = {"plain": PLAIN, "fast": OptimizerOptions(**{**recipe_options("fast"), "warmup_steps": 60})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=15)
    parser.add_argument("text", help="tinyshakespeare.txt")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="none: the times of a step alone")
    parser.add_argument("--target", type=float, default=1.65)
    parser.add_argument(
        "--steps", nargs=2, type=int, default=[1300, 530], help="of the plain run, and of the fast one"
    )
    options = parser.parse_args()
    print(f"machine  {measure.machine(options.device)}; {measure.versions('torch', 'transformers')}")
    taken = step_times(options)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    each = ", ".join(f"{name} {time * 1e3:.0f} ms" for name, time in seconds.items())
    print(f"a step   {each}: {measure.median_ratio(taken['fast'], taken['plain']):.2f} times")
    rows, figures = [], []
    for seed in options.seeds:
        for name in options.recipes:
            found = studied(name, seed, options)
            reached = found["reached"]
            time = "never" if reached is None else f"{reached * seconds[name]:.0f} s"
            rows.append([name, seed, f"{seconds[name] * 1e3:.0f} ms", reached, time, f"{found['end']:.4f}"])
            figures.append({"recipe": name, "seed": seed, "seconds_per_step": seconds[name], **found})
            measure.show(rows, ["recipe", "seed", "a step", f"steps to {options.target}", "time", "loss in the end"])
            measure.keep(options.json, {"runs": figures})


def step_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the times of a step of both recipes, taken in turns."""
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    trainers = {}
    for name, recipe in RECIPES.items():
        model = GPTKitForCausalLM(build_config(MODEL, vocab_size=VOCABULARY))
        accelerator = Accelerator(cpu=options.device == "cpu")
        trainers[name] = AMPTrainer(model, create_optimizer(model, recipe), accelerator=accelerator)
    steps = {name: lambda trainer=trainer: trainer.update([batch]) for name, trainer in trainers.items()}
    return measure.interleaved(steps, options.rounds, options.device)


def studied(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; return the first evaluated step below the target, and the final loss on the whole eval text."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(run_options(name, seed, options, Path(folder) / "run"), stream=None)
        curve = list(evaluations(result.folder / "metrics.jsonl"))
    end = result.evaluation.loss
    reached = next((step for step, loss in curve if loss <= options.target), None)
    if reached is None and end <= options.target:
        reached = result.steps
    return {"reached": reached, "end": end, "curve": curve}


def run_options(name: str, seed: int, options: argparse.Namespace, folder: Path) -> RunOptions:
    return RunOptions(
        training=TrainingOptions(
            output_dir=str(folder), use_cpu=options.device == "cpu", seed=seed, batch_size=BATCH,
            max_steps=options.steps[list(RECIPES).index(name)], eval_steps=20, max_eval_samples=250,
            save_steps=100_000, sample_steps=0, report_to=["none"],
        ),
        text=TextOptions(text_files=[options.text], eval_fraction=0.1),
        encoding=EncodingOptions(encoding="bytes"),
        windows=WindowOptions(max_length=CONTEXT, stride=CONTEXT),
        model=MODEL,
        optimizer=RECIPES[name],
    )  # fmt: skip


def evaluations(metrics: Path) -> Iterator[tuple[int, float]]:
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "eval":
            yield entry["step"], entry["loss"]


if __name__ == "__main__":
    main()
