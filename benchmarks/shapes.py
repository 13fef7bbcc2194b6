"""The modern shape against GPT-2's with one recipe: steps to the same loss, and the time of a step.

`python benchmarks/shapes.py tinyshakespeare.txt` trains GPT-2's shape for `--steps` and the modern one for 0.67 of
them, with a schedule of that length, and for all of them, for each seed, on two corpora:

- tinyshakespeare by bytes, 4 layers of 256, context 128, batches of 16;
- Python's standard library, as in examples/configs/quickstart.yaml: a BPE of 4,096 tokens, 4 layers of 128, context
  256, batches of 4, embeddings at a rate of 0.04, weight decay 0.1.

The time of a step is measured in turns, so the runs may be made beside other work, one by one, and continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import measure
import studies
import torch

from gpt_kit_hf import ModelOptions

SHARE = 0.67
# Width, context, batch, steps, and the fraction of the text that is held out.
SETTINGS = {"tinyshakespeare": (256, 128, 16, 400, 0.1), "python-stdlib": (128, 256, 4, 1600, 0.05)}
OPTIMIZERS = {
    "tinyshakespeare": studies.FAST,
    "python-stdlib": dataclasses.replace(studies.FAST, learning_rate=0.04, weight_decay=0.1),
}
PRESETS = {"classic": "nano-xs", "modern": "modern-xs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=15)
    studies.add_options(parser, results="runs/shapes.jsonl")
    parser.add_argument("--runs", nargs="+", choices=["classic", "short", "long"], default=["classic", "short"])
    parser.add_argument("--steps", type=int, help="of GPT-2's shape; the default is 400 and 1,600")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = studies.Results(options.results)
    print(f"machine  {measure.machine('cpu')}; {measure.versions('torch', 'transformers')}")
    for corpus in options.corpora:
        if options.rounds:
            results.add({"study": "step", "corpus": corpus}, step_times(corpus, options))
        for seed in options.seeds:
            for kind in options.runs:
                run(corpus, kind, seed, options, results)
        report(corpus, options, results)


def run(corpus: str, kind: str, seed: int, options: argparse.Namespace, results: studies.Results) -> None:
    """Make one run, unless the results have it."""
    steps = options.steps or SETTINGS[corpus][3]
    made = round(SHARE * steps) if kind == "short" else steps
    facts = {"study": "shapes", "corpus": corpus, "kind": kind, "steps": made, "seed": seed}
    if not results.find(**facts):
        _, context, batch, _, held_out = SETTINGS[corpus]
        work = studies.work_of(corpus, options, context, batch, held_out)
        model = shape("classic" if kind == "classic" else "modern", corpus)
        # The losses on the way are for the step at which a run of the same length is as good as GPT-2's.
        every = 20 if kind == "long" else made
        results.add(facts, studies.trained(work, model, made, seed, every, OPTIMIZERS[corpus]))


def shape(name: str, corpus: str) -> ModelOptions:
    """Return a shape; the modern one has GPT-2's number of parameters, within 3%, as its preset."""
    width, context, *_ = SETTINGS[corpus]
    return ModelOptions(model=PRESETS[name], n_layer=4, n_head=4, n_embd=width, max_position_embeddings=context)


def step_times(corpus: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the times of a step of both shapes, taken in turns."""
    _, context, batch, *_ = SETTINGS[corpus]
    vocabulary = studies.BYTES if corpus == "tinyshakespeare" else studies.BPE
    both = {name: shape(name, corpus) for name in PRESETS}
    steps = studies.steps_of(both, vocabulary, context, batch)
    taken = measure.interleaved(steps, options.rounds, "cpu")
    ratio = measure.median_ratio(taken["modern"], taken["classic"])
    return {"seconds": {name: statistics.median(times) for name, times in taken.items()}, "ratio": ratio}


def report(corpus: str, options: argparse.Namespace, results: studies.Results) -> None:
    """Print what the results have about a corpus."""
    for found in results.find(study="step", corpus=corpus)[-1:]:
        each = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in found["seconds"].items())
        print(f"\n{corpus}: a step takes {each}, {found['ratio']:.2f} times as long")
    steps = options.steps or SETTINGS[corpus][3]
    rows = []
    for made in results.find(study="shapes", corpus=corpus):
        if made["steps"] in (steps, round(SHARE * steps)):
            end = goal(results.find(study="shapes", corpus=corpus, kind="classic", steps=steps, seed=made["seed"]))
            reached = next((step for step, loss in made["curve"] if end is not None and loss <= end), None)
            facts = [f"{made['parameters']:,}", f"{made['loss']:.4f}", f"{made['bits_per_byte']:.4f}"]
            rows.append([made["kind"], made["seed"], made["steps"], *facts, reached if made["kind"] == "long" else ""])
    headings = ["run", "seed", "steps", "parameters", "loss", "bits per byte", "step with classic's loss"]
    measure.show(sorted(rows, key=lambda row: row[:2]), headings)


def goal(classic: list[dict[str, Any]]) -> float | None:
    """Return the final loss of GPT-2's shape, if that run was made."""
    return classic[0]["loss"] if classic else None


if __name__ == "__main__":
    main()
