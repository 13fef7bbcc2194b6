"""What each change from GPT-2's shape to the modern one brings: they are added one by one.

`python benchmarks/ingredients.py tinyshakespeare.txt --picture docs/images/ingredients.png` trains every rung of the
ladder with the fast recipe on two corpora, in two sizes, with three seeds; all rungs of a size have the same number of
parameters. Then it prints the held-out losses, and draws them. The time of a step is measured in turns, and the memory
in a process for each; both belong to the wider size. All runs are kept in the file `--results`, and a run that is in
it is not made again: the study can be stopped and continued, and its parts made one by one (`--corpora`, `--widths`,
`--rungs`, `--seeds`; with `--rounds 0` the training alone).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
from typing import Any

import matplotlib
import measure
import psutil
import studies
import torch

from gpt_kit_hf import ModelOptions
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory

matplotlib.use("agg")
from matplotlib import pyplot as plt

CONTEXT, BATCH, HELD_OUT = 128, 16, 0.04
SEED_COLOUR, MEAN_COLOUR = "#b8bfc6", "#2a6f97"
# Each rung has its own change and those of all rungs above it.
CHANGES: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "+ rotary positions": {"position_embedding": "rotary"},
    "+ RMSNorm, no biases": {"norm": "rmsnorm", "use_bias": False, "layer_norm_epsilon": 1e-6},
    "+ SwiGLU": {"mlp": "swiglu"},
    "+ QK-norm": {"qk_norm": True},
    "+ zero-initialised residuals": {"zero_init_residual": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=15)
    studies.add_options(parser, results="runs/ingredients.jsonl")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128], help="of models with 4 layers")
    parser.add_argument("--rungs", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--picture", help="file of the picture to draw")
    parser.add_argument("--measure", choices=CHANGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(peak(options.measure, options)))
        return
    results = studies.Results(options.results)
    print(f"machine  {measure.machine('cpu')}; {measure.versions('torch', 'transformers')}")
    if options.rounds:
        add_costs(options, results)
    # All rungs of a seed come first: then a study that is not complete compares like with like.
    for seed in options.seeds:
        for corpus in options.corpora:
            for width in options.widths:
                for rung in options.rungs:
                    run(rung, corpus, width, seed, options, results)
    rows = table(options, results)
    measure.show(rows, ["rung", "corpus", "width", "parameters", "seeds", "loss", "spread", "change"])
    measure.show(costs(results), ["rung", "a step", "to GPT-2", "memory"])
    measure.keep(options.json, {"options": vars(options), "losses": rows, "costs": costs(results)})
    if options.picture:
        draw(options, results)


def rung_of(rung: str, width: int, vocabulary: int) -> ModelOptions:
    """Return the model of a rung, with as many parameters as GPT-2's shape."""
    plain = ModelOptions(model="nano-xs", n_layer=4, n_head=4, n_embd=width, max_position_embeddings=CONTEXT)
    names = list(CHANGES)
    fields: dict[str, Any] = {}
    for name in names[: names.index(rung) + 1]:
        fields |= CHANGES[name]
    if not fields:
        return plain
    changed = ModelOptions(**{**vars(plain), **fields})
    return studies.of_size(changed, vocabulary, studies.parameters(plain, vocabulary))


def run(
    rung: str, corpus: str, width: int, seed: int, options: argparse.Namespace, results: studies.Results
) -> None:  # fmt: skip
    """Train a rung, unless the results have it."""
    facts = {"study": "loss", "rung": rung, "corpus": corpus, "width": width, "steps": options.steps, "seed": seed}
    if not results.find(**facts):
        work = studies.work_of(corpus, options, CONTEXT, BATCH, HELD_OUT)
        results.add(facts, studies.trained(work, rung_of(rung, width, work.vocabulary), options.steps, seed))


def add_costs(options: argparse.Namespace, results: studies.Results) -> None:
    """Measure the time of a step of all rungs in turns, and the memory that each needs."""
    width = max(options.widths)
    models = {rung: rung_of(rung, width, studies.BYTES) for rung in CHANGES}
    steps = studies.steps_of(models, studies.BYTES, CONTEXT, BATCH)
    taken = measure.interleaved(steps, options.rounds, "cpu")
    first = next(iter(CHANGES))
    for rung, times in taken.items():
        ratio = measure.median_ratio(times, taken[first])
        found = {"seconds": statistics.median(times), "ratio": ratio, **measure.in_a_process("--measure", rung)}
        results.add({"study": "cost", "rung": rung, "width": width}, found)


def peak(rung: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the most memory that three steps hold, beyond what the process held before the model was made."""
    tiny = ModelOptions(model="nano-xs", n_layer=1, n_head=1, n_embd=8, max_position_embeddings=8)
    studies.steps_of({"tiny": tiny}, 16, 8, 1)["tiny"]()  # the libraries that a step loads count for nobody
    reuse_freed_memory()  # as `gpt-kit train` does
    before = psutil.Process().memory_info().rss
    model = rung_of(rung, max(options.widths), studies.BYTES)
    step = studies.steps_of({rung: model}, studies.BYTES, CONTEXT, BATCH)[rung]
    for _ in range(3):
        step()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak": most - before}


def table(options: argparse.Namespace, results: studies.Results) -> list[list[Any]]:
    """Return a row for each rung, corpus and width with results.

    The spread is the standard deviation over the seeds. The change is the mean of the differences from the rung above,
    each between runs of one seed, with its standard deviation.
    """
    rows: list[list[Any]] = []
    for corpus in options.corpora:
        for width in options.widths:
            above: dict[int, float] = {}
            for rung, runs in runs_of(corpus, width, options, results).items():
                losses = {made["seed"]: made["loss"] for made in runs}
                changes = [loss - above[seed] for seed, loss in losses.items() if seed in above]
                mean, spread = statistics.mean(losses.values()), spread_of(list(losses.values()))
                change = f"{statistics.mean(changes):+.4f} {spread_of(changes, '({:.4f})')}".strip() if changes else ""
                size = runs[0]["parameters"]
                rows.append([rung, corpus, width, size, len(losses), f"{mean:.4f}", spread, change])
                above = losses
    return rows


def runs_of(
    corpus: str, width: int, options: argparse.Namespace, results: studies.Results
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Return the runs of each rung that has some."""
    facts = {"study": "loss", "corpus": corpus, "width": width, "steps": options.steps}
    found = {rung: results.find(rung=rung, **facts) for rung in CHANGES}
    return {rung: runs for rung, runs in found.items() if runs}


def spread_of(values: list[float], form: str = "{:.4f}") -> str:
    """Return the standard deviation as text, nothing for a single value."""
    return form.format(statistics.stdev(values)) if len(values) > 1 else ""


def costs(results: studies.Results) -> list[list[str]]:
    """Return a row for each rung: time and memory, as last measured."""
    last = {found["rung"]: found for found in results.find(study="cost")}
    return [
        [rung, f"{found['seconds'] * 1e3:.0f} ms", f"{found['ratio']:.2f}", f"{found['peak'] / 1e6:.0f} MB"]
        for rung, found in last.items()
    ]


def draw(options: argparse.Namespace, results: studies.Results) -> None:
    """Draw the losses: a panel for each corpus and width, a dot for each seed, and the means."""
    panels = [(corpus, width) for corpus in options.corpora for width in options.widths]
    size = (3 * len(panels) + 2, 3)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    for axis, (corpus, width) in zip(axes[0], panels, strict=True):
        runs = runs_of(corpus, width, options, results)
        losses = {rung: [made["loss"] for made in found] for rung, found in runs.items()}
        for height, values in enumerate(losses.values()):
            axis.plot(values, [height] * len(values), "o", color=SEED_COLOUR, markersize=5)
            mean = statistics.mean(values)
            axis.annotate(f"{mean:.3f}", (mean, height), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        means = [statistics.mean(values) for values in losses.values()]
        axis.plot(means, range(len(means)), "D-", color=MEAN_COLOUR, markersize=5, linewidth=1)
        axis.set_yticks(range(len(losses)), list(losses), fontsize=9)
        axis.set_title(f"{corpus}, 4 x {width}", fontsize=10, loc="left")
        axis.set_xlabel("held-out loss, nats per token", fontsize=9)
        axis.margins(x=0.16, y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.savefig(options.picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
