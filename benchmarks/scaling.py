"""The law of `gpt-kit plan`: bits per byte by the size of the model, the length of training and the size of the text.

`python benchmarks/scaling.py tinyshakespeare.txt` makes the runs that its results lack, modern shapes with the recipe
`fast`, and fits the constants of `gpt_kit_hf/training/planning/law.py` to them and to the runs of `sweep.py`, if
`sweep.jsonl` lies beside the results, by the Huber loss of the relative error. It prints the constants, the error for
a text without whose runs they are fitted, which is the uncertainty of a plan, and each run beside what the law says.
One thread (`--threads 1`) is enough; the runs then take 40 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import studies
import torch

from gpt_kit_hf import EncodingOptions, ModelOptions, OptimizerOptions, TextOptions, choose_encoding
from gpt_kit_hf.data.text.corpus import prepare_corpus
from gpt_kit_hf.evaluation.metrics import gzip_bits_per_byte, token_byte_lengths
from gpt_kit_hf.options.training import recipe_options
from gpt_kit_hf.training.planning.choice import FEW_STEPS
from gpt_kit_hf.training.planning.corpus_facts import NEAR_BITS
from gpt_kit_hf.training.planning.law import Law, layer_parameters
from gpt_kit_hf.training.planning.recipe import MANY_EPOCHS, ema_decay_for, recipe_by_length, weight_decay_for

# Text, layers, width, steps. Parts of tinyshakespeare are read many times, with what a plan has then.
RUNS = [
    ("tinyshakespeare", 2, 64, 400),
    ("tinyshakespeare", 2, 64, 1600),
    ("tinyshakespeare", 4, 128, 400),
    ("tinyshakespeare", 4, 128, 1200),
    ("tinyshakespeare", 4, 256, 230),
    ("tenth", 4, 128, 200),
    ("tenth", 4, 128, 400),
    ("tenth", 4, 128, 800),
    ("tenth", 2, 64, 400),
    ("tenth", 2, 64, 800),
    ("fortieth", 2, 64, 200),
    ("fortieth", 2, 64, 400),
    ("fortieth", 4, 128, 200),
    ("python-stdlib", 2, 64, 400),
    ("python-stdlib", 4, 128, 300),
    ("python-stdlib", 4, 256, 150),
    ("torch-headers", 2, 64, 400),
    ("torch-headers", 4, 128, 300),
    ("python-topics", 2, 64, 400),
    ("python-topics", 4, 128, 300),
]
PARTS = {"tenth": 10, "fortieth": 40}
# Texts of installed packages: C++ headers, English documentation.
PACKAGED = {
    "torch-headers": Path(torch.__file__).parent / "include" / "torch" / "csrc",
    "python-topics": Path(pydoc_data.topics.__file__),
}
# What the law is made of, and where its other constants are looked for. The two powers are those of Hoffmann et al.
# 2022, section 3.3: the runs here are too small to tell them. Left free they fit little better, and extrapolate badly.
FACTORS = ("floor", "size", "length")
BOUNDS = {"gzip_power": (0.0, 1.5), "size_power": (0.34, 0.34), "length_power": (0.28, 0.28), "repeats": (0.3, 40.0)}
# Relative error from which on a run counts less, and how often the factors are fitted with the weights that follow.
_SMALL_ERROR, _REWEIGHTED = 0.02, 6
FREE = len(FACTORS) + sum(low < high for low, high in BOUNDS.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare.txt")
    parser.add_argument(
        "--results", default="runs/scaling.jsonl", help="file of the runs; those in it are not repeated"
    )
    parser.add_argument("--corpora", nargs="+", help="make only the runs of these")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--fit_only", action="store_true", help="make no run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = studies.Results(options.results)
    for corpus, layers, width, steps in [] if options.fit_only else RUNS:
        if options.corpora is not None and corpus not in options.corpora:
            continue
        facts = {"study": "scaling", "corpus": corpus, "layers": layers, "width": width, "steps": steps}
        if not any(map(as_planned, results.find(**facts))):
            results.add(facts, run(corpus, layers, width, steps, options))
    report([*filter(as_planned, [*results.find(study="scaling"), *of_sweeps(results)])])


def as_planned(run: dict[str, Any]) -> bool:
    """Return whether a run has the steps, weight decay and average of a plan; it may read a text more often."""
    of_text = (epochs(run), run["layer_parameters"] / run["text_tokens"])
    chosen = (0.0, weight_decay_for(*of_text), ema_decay_for(*of_text, run["steps"]))
    return run["steps"] >= FEW_STEPS and (run["dropout"], run["weight_decay"], run.get("ema_decay")) == chosen


def of_sweeps(results: studies.Results) -> Iterator[dict[str, Any]]:
    """Yield the runs of `sweep.py`, whose results lie beside those of this study, but for those of other rates."""
    sweeps = studies.Results(str(results.file.with_name("sweep.jsonl")))
    for plan in sweeps.find(study="plan"):
        for run in sweeps.find(study="sweep", text=plan["text"], budget=plan["budget"], seed=plan["seed"]):
            values = {**plan["values"], **run["changed"]}
            if {"learning_rate", "muon_learning_rate", "muon_momentum", "encoding"} & run["changed"].keys():
                continue
            yield {
                "corpus": run["text"],
                "layers": values["n_layer"],
                "width": values["n_embd"],
                "steps": run["steps"],
                "bits_per_byte": run["bits_per_byte"],
                "gzip_near": plan["gzip_near"],
                "text_tokens": plan["text_tokens"],
                "seen_tokens": run["steps"] * values["batch_size"] * values["max_length"],
                "layer_parameters": layer_parameters(values["n_layer"], values["n_embd"]),
                "dropout": values["dropout"],
                "weight_decay": values["weight_decay"],
                "ema_decay": values.get("ema_decay"),
            }


def modern(layers: int, width: int, context: int, **options: Any) -> ModelOptions:
    """Return a modern shape with heads of 32, from a width of 256 on of 64, without dropout of attention."""
    heads = width // 32 if width < 256 else width // 64
    return ModelOptions(
        model="modern-xs",
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        max_position_embeddings=context,
        **{"attn_pdrop": 0.0, **options},
    )


def run(corpus: str, layers: int, width: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; return the score, and what the law needs."""
    work = work_of(corpus, options)
    encoding = choose_encoding(work.text, work.encoding)
    read = prepare_corpus(work.text, encoding, seed=0)
    counts = read.train.counts(encoding.n_vocab)
    bytes_per_token = float(counts @ token_byte_lengths(encoding) / counts.sum())
    seen = steps * work.batch * work.context
    of_text = (seen / len(read.train), layer_parameters(layers, width) / len(read.train))
    by_length = recipe_by_length(
        steps,
        step_tokens=work.batch * work.context,
        epochs=of_text[0],
        parameters_per_token=of_text[1],
        vocab_size=work.vocabulary,
    )
    optimizer = OptimizerOptions(**{**recipe_options("fast", vocab_size=work.vocabulary), **by_length})
    best = of_text[0] >= MANY_EPOCHS
    found = studies.trained(
        work, modern(layers, width, work.context), steps, 0, steps // 8 if best else None, optimizer, best=best
    )
    return {
        **{name: found[name] for name in ("loss", "bits_per_byte", "parameters", "versions")},
        "gzip_near": gzip_bits_per_byte(read.eval, encoding, window_bits=NEAR_BITS),
        "bytes_per_token": bytes_per_token,
        "text_tokens": len(read.train),
        "seen_tokens": seen,
        "layer_parameters": layer_parameters(layers, width),
        "dropout": 0.0,
        "weight_decay": optimizer.weight_decay,
        "ema_decay": optimizer.ema_decay,
    }


def work_of(corpus: str, options: argparse.Namespace) -> studies.Work:
    """Return a corpus by name; what is held out of a part of tinyshakespeare is from elsewhere in it."""
    if corpus in PACKAGED:
        bpe = corpus == "torch-headers"
        return studies.Work(
            TextOptions(text_files=[str(PACKAGED[corpus])], eval_fraction=0.1),
            EncodingOptions(encoding="bpe", vocab_size=studies.BPE) if bpe else EncodingOptions(encoding="bytes"),
            studies.BPE if bpe else studies.BYTES, 256, 8,
        )  # fmt: skip
    if corpus not in PARTS:
        context, batch = (256, 8) if corpus == "python-stdlib" else (128, 16)
        return studies.work_of(corpus, options, context, batch, 0.05 if corpus == "python-stdlib" else 0.1)
    folder = Path(options.results).with_suffix(".text")
    folder.mkdir(parents=True, exist_ok=True)
    whole = Path(options.text).read_bytes()
    part = folder / f"{corpus}.txt"
    part.write_bytes(whole[len(whole) // 3 :][: len(whole) // PARTS[corpus]])
    held_out = folder / "held_out.txt"
    held_out.write_bytes(whole[-len(whole) // 10 :])
    text = TextOptions(text_files=[str(part)], eval_files=[str(held_out)])
    return studies.Work(text, EncodingOptions(encoding="bytes"), studies.BYTES, 128, 16)


def report(runs: list[dict[str, Any]]) -> None:
    """Fit the law to the runs, and print its constants and what it says of each run."""
    law = fitted(runs)
    errors = [math.log(said(law, run) / run["bits_per_byte"]) for run in runs]
    deviation = math.sqrt(sum(error**2 for error in errors) / max(1, len(errors) - FREE))
    unseen = list[float]()  # errors of the law for a text without whose runs it is fitted
    for text in sorted(set(map(text_of, runs))):
        without = fitted([run for run in runs if text_of(run) != text])
        unseen += [math.log(said(without, run) / run["bits_per_byte"]) for run in runs if text_of(run) == text]
    rows = [
        [
            run["corpus"], f"{run['layers']} x {run['width']}", run["steps"],
            f"{epochs(run):.2f}", f"{run['bits_per_byte']:.3f}", f"{said(law, run):.3f}",
            f"{error:+.1%}",
        ]
        for run, error in zip(runs, errors, strict=True)
    ]  # fmt: skip
    measure.show(rows, ["text", "shape", "steps", "epochs", "bits per byte", "by the law", "error"])
    print(law)
    print(f"standard deviation of the residuals: {deviation:.4f}")
    print(f"root mean square for a text without whose runs the law is fitted: {np.sqrt(np.square(unseen).mean()):.4f}")


def text_of(run: dict[str, Any]) -> str:
    """Return the name of the text of a run, that of the whole if it is a part."""
    return "tinyshakespeare" if run["corpus"] in PARTS else Path(run["corpus"]).stem


def said(law: Law, run: dict[str, Any]) -> float:
    return law.bits_per_byte(run["gzip_near"], **run_of(run))


def epochs(run: dict[str, Any]) -> float:
    return float(run["seen_tokens"] / run["text_tokens"])


def run_of(run: dict[str, Any]) -> dict[str, float]:
    return {"parameters": run["layer_parameters"], "seen": run["seen_tokens"], "text": run["text_tokens"]}


def fitted(runs: list[dict[str, Any]]) -> Law:
    """Return the law with the least Huber loss of the relative errors, by a random search that narrows.

    Of each try the powers are drawn, and the factors follow by linear least squares, weighted again and again.
    """
    rng, (lowest, highest) = np.random.default_rng(0), np.array(list(BOUNDS.values())).T
    middle = (lowest + highest) / 2
    best, best_error = with_factors(dict(zip(BOUNDS, middle.tolist(), strict=True)), runs)
    for reach in np.geomspace(1.0, 0.01, 40):
        for drawn in middle + (rng.random((400, len(BOUNDS))) - 0.5) * reach * (highest - lowest):
            drawn = np.clip(drawn, lowest, highest)
            law, error = with_factors(dict(zip(BOUNDS, drawn.tolist(), strict=True)), runs)
            if error < best_error:
                best_error, best, middle = error, law, drawn
    return Law(**{name: round(value, 4) for name, value in dataclasses.asdict(best).items()})


def with_factors(powers: dict[str, float], runs: list[dict[str, Any]]) -> tuple[Law, float]:
    """Return the law with these powers and the best factors, none of them negative, and its mean Huber loss.

    That is half the square of small errors, and grows with the large ones only (Huber 1964, "Robust Estimation of a
    Location Parameter"), as in Hoffmann et al. 2022: a few runs must not bend the law that fits the others.
    """
    one = Law(**powers, **dict.fromkeys(FACTORS, 1.0))
    terms = np.array([one.terms(**run_of(run)) for run in runs])  # (runs, factors)
    wanted = np.array([run["bits_per_byte"] / run["gzip_near"] ** powers["gzip_power"] for run in runs])
    kept, weights = list(range(len(FACTORS))), np.ones(len(runs))
    for _ in range(_REWEIGHTED):
        by_run = np.sqrt(weights)
        while True:
            factors, *_ = np.linalg.lstsq(by_run[:, None] * terms[:, kept] / wanted[:, None], by_run, rcond=None)
            if factors.min() >= 0:
                break
            kept.pop(int(factors.argmin()))
        errors = np.abs(terms[:, kept] @ factors / wanted - 1)
        weights = _SMALL_ERROR / np.maximum(errors, _SMALL_ERROR)
    found = dict.fromkeys(FACTORS, 0.0) | {FACTORS[n]: float(each) for n, each in zip(kept, factors, strict=True)}
    small = np.minimum(errors, _SMALL_ERROR)
    return Law(**powers, **found), float((small * (errors - small / 2)).mean())


if __name__ == "__main__":
    main()
