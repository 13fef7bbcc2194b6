"""What each part of the recipe `fast` brings: tinyshakespeare by bytes, 4 layers of 256, context 128, batches of 16.

`python benchmarks/recipes.py tinyshakespeare.txt` trains the modern shape for `--steps` with the recipe, with the
recipe but for one part, and with AdamW, for each seed, and prints the loss on all held-out text. The time of a step
is measured in turns, so the runs may be made beside other work, one by one, and continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import measure
import studies
import torch

from gpt_kit_hf import ModelOptions, OptimizerOptions
from gpt_kit_hf.options.training import recipe_options

CORPUS, WIDTH, CONTEXT, BATCH, HELD_OUT = "tinyshakespeare", 256, 128, 16, 0.1
MODEL = ModelOptions(model="modern-xs", n_layer=4, n_head=4, n_embd=WIDTH, max_position_embeddings=CONTEXT)
FAST = OptimizerOptions(**recipe_options("fast", vocab_size=studies.BYTES))
RECIPES = {
    "fast": FAST,
    "momentum 0.95": dataclasses.replace(FAST, muon_momentum=0.95),
    "rows as they are": dataclasses.replace(FAST, muon_beta2=None),
    "warmup of a tenth": dataclasses.replace(FAST, warmup_steps=0.1),
    "rates to zero": dataclasses.replace(FAST, min_lr_ratio=0.0),
    "an average": dataclasses.replace(FAST, ema_decay=0.97),
    # Between the rates 2e-3 and 4e-3, which are worse.
    "adamw": OptimizerOptions(learning_rate=2.5e-3, min_lr_ratio=0.02),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=15)
    studies.add_options(parser, results="runs/recipes.jsonl")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=230)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = studies.Results(options.results)
    print(f"machine  {measure.machine('cpu')}; {measure.versions('torch', 'transformers')}")
    if options.rounds:
        step_times(options)
    work = studies.work_of(CORPUS, options, CONTEXT, BATCH, HELD_OUT)
    for seed in options.seeds:
        for name in options.recipes:
            facts = {"study": "recipes", "recipe": name, "steps": options.steps, "seed": seed}
            if not results.find(**facts):
                results.add(facts, studies.trained(work, MODEL, options.steps, seed, optimizer=RECIPES[name]))
    report(options, results)


def step_times(options: argparse.Namespace) -> None:
    """Print the times of a step of each recipe, taken in turns."""
    models = dict.fromkeys(options.recipes, MODEL)
    steps = studies.steps_of(models, studies.BYTES, CONTEXT, BATCH, RECIPES)
    taken = measure.interleaved(steps, options.rounds, "cpu")
    first = options.recipes[0]
    rows = [
        [name, f"{statistics.median(times) * 1e3:.0f} ms", f"{measure.median_ratio(times, taken[first]):.2f}"]
        for name, times in taken.items()
    ]
    measure.show(rows, ["recipe", "a step", f"times that of {first}"])


def report(options: argparse.Namespace, results: studies.Results) -> None:
    """Print the losses after so many steps, by recipe."""
    rows = []
    for name in options.recipes:
        found = results.find(study="recipes", recipe=name, steps=options.steps)
        losses = [f"{run['loss']:.4f}" for run in sorted(found, key=lambda run: run["seed"])]
        if found:
            rows.append([name, f"{statistics.mean(run['loss'] for run in found):.4f}", " ".join(losses)])
    measure.show(rows, ["recipe", "mean loss", "by seed"])


if __name__ == "__main__":
    main()
