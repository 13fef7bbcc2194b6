"""What dropout, weight decay and an average of the weights bring when a text is read many times.

`python benchmarks/passes.py tinyshakespeare.txt` trains 4 layers of 128 on a tenth of tinyshakespeare by bytes, with
the recipe `fast` and each of the changes below. It prints the loss on all held-out text after the last step, and that
of the best evaluation on the way. Runs are kept in the file `--results`; those in it are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses

import measure
import scaling
import studies
import torch
from recipes import FAST

from gpt_kit_hf import ModelOptions

MODEL = ModelOptions(model="modern-xs", n_layer=4, n_head=4, n_embd=128, max_position_embeddings=128)


def with_dropout(dropout: float, *, attention: bool) -> ModelOptions:
    return dataclasses.replace(MODEL, dropout=dropout, attn_pdrop=dropout if attention else 0.0)


# Model and optimizer of each run, by name.
RUNS = {
    "dropout 0.2": (with_dropout(0.2, attention=False), FAST),
    "dropout 0.2, also of attention": (with_dropout(0.2, attention=True), FAST),
    "dropout 0.1": (with_dropout(0.1, attention=False), FAST),
    "dropout 0.3": (with_dropout(0.3, attention=False), FAST),
    "no dropout": (MODEL, FAST),
    "no dropout, weight decay 1": (MODEL, dataclasses.replace(FAST, weight_decay=1.0)),
    "dropout 0.1, weight decay 1": (with_dropout(0.1, attention=False), dataclasses.replace(FAST, weight_decay=1.0)),
    "dropout 0.2, weight decay 1": (with_dropout(0.2, attention=False), dataclasses.replace(FAST, weight_decay=1.0)),
    "dropout 0.2, an average": (with_dropout(0.2, attention=False), dataclasses.replace(FAST, ema_decay=0.98)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies.add_options(parser, results="runs/passes.jsonl")
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 400], help="3.7 and 7.3 passes")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = studies.Results(options.results)
    work = scaling.work_of("tenth", options)
    for steps in options.steps:
        for seed in options.seeds:
            for name in options.runs:
                facts = {"study": "passes", "run": name, "steps": steps, "seed": seed}
                if not results.find(**facts):
                    model, optimizer = RUNS[name]
                    found = studies.trained(work, model, steps, seed, steps // 8, optimizer)
                    results.add(facts, found)
        report(results, steps)


def report(results: studies.Results, steps: int) -> None:
    """Print the losses of the runs of so many steps, the best first."""
    found = sorted(results.find(study="passes", steps=steps), key=lambda run: run["loss"])
    rows = [
        [run["run"], run["seed"], f"{run['loss']:.4f}", f"{min(loss for _, loss in run['curve']):.4f}"]
        for run in found
    ]
    print(f"{steps} steps")
    measure.show(rows, ["run", "seed", "loss in the end", "best on the way, of 64 windows"])


if __name__ == "__main__":
    main()
