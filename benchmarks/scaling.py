"""The law of `gpt-kit plan`: bits per byte by the size of the model, the length of training and the size of the text.

`python benchmarks/scaling.py tinyshakespeare.txt` makes the runs that its results lack, modern shapes with the recipe
`fast`, and fits the constants of `gpt_kit_hf/training/planning/law.py` to all of them: least squares of the logarithm
of the bits per byte. It prints the constants, the standard deviation of the residuals, which is the uncertainty of a
plan, and each run beside what the law says. One thread (`--threads 1`) is enough; the runs then take 40 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import measure
import studies
import torch

from gpt_kit_hf import EncodingOptions, ModelOptions, OptimizerOptions, TextOptions, choose_encoding
from gpt_kit_hf.data.text.corpus import prepare_corpus
from gpt_kit_hf.evaluation.metrics import gzip_bits_per_byte
from gpt_kit_hf.options.training import recipe_options
from gpt_kit_hf.training.planning.law import Law, layer_parameters

FAST = OptimizerOptions(**recipe_options("fast"))
# The vocabulary of 4,096 is large for these models: its embeddings learn ten times as fast.
OPTIMIZERS = {studies.BYTES: FAST, studies.BPE: dataclasses.replace(FAST, learning_rate=0.04)}
NAMES = ("size", "size_power", "length", "length_power", "repeats")
# Text, layers, width, steps. A tenth of tinyshakespeare is read many times.
RUNS = [
    ("tinyshakespeare", 2, 64, 100),
    ("tinyshakespeare", 2, 64, 400),
    ("tinyshakespeare", 2, 64, 1600),
    ("tinyshakespeare", 4, 128, 100),
    ("tinyshakespeare", 4, 128, 400),
    ("tinyshakespeare", 4, 128, 1200),
    ("tinyshakespeare", 4, 256, 60),
    ("tinyshakespeare", 4, 256, 230),
    ("tenth", 4, 128, 200),
    ("tenth", 4, 128, 800),
    ("tenth", 2, 64, 800),
    ("python-stdlib", 2, 64, 100),
    ("python-stdlib", 2, 64, 400),
    ("python-stdlib", 4, 128, 100),
    ("python-stdlib", 4, 128, 300),
    ("python-stdlib", 4, 256, 150),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare.txt")
    parser.add_argument(
        "--results", default="runs/scaling.jsonl", help="file of the runs; those in it are not repeated"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--fit_only", action="store_true", help="make no run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = studies.Results(options.results)
    for corpus, layers, width, steps in [] if options.fit_only else RUNS:
        facts = {"study": "scaling", "corpus": corpus, "layers": layers, "width": width, "steps": steps}
        if not results.find(**facts):
            results.add(facts, run(corpus, layers, width, steps, options))
    runs = results.find(study="scaling")
    report([run for run in runs if not has_overfitted(run, runs)])


def run(corpus: str, layers: int, width: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; return the score, and what the law needs."""
    work = work_of(corpus, options)
    heads = width // 32 if width < 256 else width // 64
    model = ModelOptions(
        model="modern-xs", n_layer=layers, n_head=heads, n_embd=width, max_position_embeddings=work.context
    )
    encoding = choose_encoding(work.text, work.encoding)
    read = prepare_corpus(work.text, encoding, seed=0)
    found = studies.trained(work, model, steps, 0, optimizer=OPTIMIZERS[work.vocabulary])
    return {
        **{name: found[name] for name in ("loss", "bits_per_byte", "parameters", "versions")},
        "gzip": gzip_bits_per_byte(read.eval, encoding),
        "text_tokens": len(read.train),
        "seen_tokens": steps * work.batch * work.context,
        "layer_parameters": layer_parameters(layers, width),
    }


def work_of(corpus: str, options: argparse.Namespace) -> studies.Work:
    """Return a corpus by name; a tenth of tinyshakespeare is held out from elsewhere in it."""
    if corpus != "tenth":
        context, batch = (256, 8) if corpus == "python-stdlib" else (128, 16)
        return studies.work_of(corpus, options, context, batch, 0.05 if corpus == "python-stdlib" else 0.1)
    folder = Path(options.results).with_suffix(".text")
    folder.mkdir(parents=True, exist_ok=True)
    whole = Path(options.text).read_bytes()
    parts = {"tenth.txt": whole[len(whole) // 3 :][: len(whole) // 10], "held_out.txt": whole[-len(whole) // 10 :]}
    for name, part in parts.items():
        (folder / name).write_bytes(part)
    text = TextOptions(text_files=[str(folder / "tenth.txt")], eval_files=[str(folder / "held_out.txt")])
    return studies.Work(text, EncodingOptions(encoding="bytes"), studies.BYTES, 128, 16)


def report(runs: list[dict[str, Any]]) -> None:
    """Fit the law to the runs, and print its constants and what it says of each run."""
    law = fitted(runs)
    errors = [math.log(said(law, run) / run["bits_per_byte"]) for run in runs]
    deviation = math.sqrt(sum(error**2 for error in errors) / max(1, len(errors) - len(dataclasses.fields(Law))))
    rows = [
        [
            run["corpus"], f"{run['layers']} x {run['width']}", run["steps"],
            f"{run['seen_tokens'] / run['text_tokens']:.2f}", f"{run['bits_per_byte']:.3f}", f"{said(law, run):.3f}",
            f"{error:+.1%}",
        ]
        for run, error in zip(runs, errors, strict=True)
    ]  # fmt: skip
    measure.show(rows, ["text", "shape", "steps", "epochs", "bits per byte", "by the law", "error"])
    print(law)
    print(f"standard deviation of the residuals: {deviation:.4f}")


def has_overfitted(run: dict[str, Any], runs: list[dict[str, Any]]) -> bool:
    """Return whether a shorter run is better: the law is about a run's best checkpoint, which a plan publishes."""
    same = [other for other in runs if all(other[name] == run[name] for name in ("corpus", "layers", "width"))]
    return any(other["steps"] < run["steps"] and other["bits_per_byte"] < run["bits_per_byte"] for other in same)


def said(law: Law, run: dict[str, Any]) -> float:
    return law.bits_per_byte(
        run["gzip"], parameters=run["layer_parameters"], seen=run["seen_tokens"], text=run["text_tokens"]
    )


def fitted(runs: list[dict[str, Any]]) -> Law:
    """Return the law with the least squares of the logarithms, from several starting points."""
    best: tuple[float, Law] | None = None
    for repeats in (4.0, 15.0):
        for start in ((-1.0, -1.2, -1.0, -0.7), (-2.0, -1.0, -1.0, -0.5), (-1.0, -0.5, -1.5, -1.0)):
            law, error = descended(runs, start, repeats)
            if best is None or error < best[0]:
                best = error, law
    assert best is not None
    return best[1]


def descended(runs: list[dict[str, Any]], start: tuple[float, ...], repeats: float) -> tuple[Law, float]:
    values = torch.tensor([*start, math.log(repeats)], dtype=torch.float64, requires_grad=True)
    columns = {
        name: torch.tensor([float(run[name]) for run in runs], dtype=torch.float64)
        for name in ("gzip", "layer_parameters", "seen_tokens", "text_tokens", "bits_per_byte")
    }
    optimizer = torch.optim.LBFGS(
        [values], lr=0.5, max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        size, size_power, length, length_power, turns = (value.exp() for value in values)
        epochs = columns["seen_tokens"] / columns["text_tokens"]
        more = torch.where(epochs > 1, turns * (1 - torch.exp(-(epochs - 1).clamp(min=0) / turns)), epochs - 1)
        seen = columns["text_tokens"] * (1 + more)
        ratio = size * (columns["layer_parameters"] / 1e6) ** -size_power + length * (seen / 1e6) ** -length_power
        return (ratio * columns["gzip"] / columns["bits_per_byte"]).log().square().mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        error = loss()
        error.backward()  # type: ignore[no-untyped-call]
        return error

    optimizer.step(closure)
    found = [round(float(value.exp()), 4) for value in values.detach()]
    return Law(**dict(zip(NAMES, found, strict=True))), float(loss().detach())


if __name__ == "__main__":
    main()
