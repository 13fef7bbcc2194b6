"""A plan against runs around it: wider, deeper, other rates, batches and contexts, each in the same time.

`python benchmarks/sweep.py tinyshakespeare.txt --budget 3m` makes the plan that `gpt-kit plan` makes, trains it and
every change of it, and prints how far the plan is from the best of them. All runs take the time of the plan: a step is
timed in turns with the plan's, so the sweep may be made beside other work. Plan and runs are kept in the file
`--results`; a sweep that is started again goes on with the runs that are not in it, and `--only` makes some of them.
`python-stdlib` is a text, too. Changes of the vocabulary are made only with `--eval_files`, as the tokens decide where
a text is split.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import studies
import torch
from accelerate import Accelerator

from gpt_kit_hf import AMPTrainer, Batch, GPTKitForCausalLM, RunOptions, choose_encoding, create_optimizer, train
from gpt_kit_hf.errors import GPTKitError
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.parser import build_options, parse_options
from gpt_kit_hf.training.planning.plan import make_plan
from gpt_kit_hf.training.runtime.compilation import compile_blocks

PLAN = "the plan"
# Options that do not change what a step takes.
_NOT_OF_THE_TIME = {"learning_rate", "muon_learning_rate", "muon_momentum", "weight_decay"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    parser.add_argument("text_files", nargs="+")
    parser.add_argument("--eval_files", nargs="+")
    parser.add_argument("--budget", default="3m")
    parser.add_argument("--results", default="runs/sweep.jsonl", help="file of the runs; those in it are not repeated")
    parser.add_argument("--only", nargs="+", choices=[PLAN, *CHANGES], help="of the runs that the results lack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = studies.Results(options.results)
    text = " ".join(Path(name).name for name in options.text_files)
    facts = {"study": "sweep", "text": text, "budget": options.budget, "seed": options.seed}
    plan = planned(facts, options, results)
    for name, values in runs_around(plan["values"]).items():
        if (options.only is None or name in options.only) and not results.find(**facts, run=name):
            try:
                found = made(values, plan["values"], options)
            except GPTKitError as error:  # such as a context that is longer than the held-out text
                print(f"{name} is left out: {error}")
                continue
            results.add({**facts, "run": name}, found)
            report(facts, plan, results)
    report(facts, plan, results)


def planned(facts: dict[str, Any], options: argparse.Namespace, results: studies.Results) -> dict[str, Any]:
    """Return the plan: that of the results, so that all runs are around the same one, or a new one."""
    of_plan = {**facts, "study": "plan"}
    if not results.find(**of_plan):
        arguments = ["--text_files", *options.text_files, "--budget", options.budget, "--output_dir", "run"]
        arguments += ["--seed", str(options.seed), *(["--use_cpu"] if options.device == "cpu" else [])]
        arguments += ["--eval_files", *options.eval_files] if options.eval_files else []
        plan = make_plan(parse_options(RunOptions, arguments, prog="sweep"), print)
        found = {"values": plan.values, "expected": plan.bits_per_byte, "seconds": plan.seconds}
        found |= {"gzip_near": plan.facts.gzip_near, "text_tokens": plan.facts.tokens}
        results.add(of_plan, {**found, "threads": options.threads, "machine": measure.machine(options.device)})
    return results.find(**of_plan)[0]


# --- the runs around the plan

Values = dict[str, Any]


def times(name: str, factor: float) -> Callable[[Values], Values]:
    """Return the change of an option by a factor; whole numbers stay whole."""

    def change(values: Values) -> Values:
        old = values[name]
        return {name: max(1, round(old * factor)) if isinstance(old, int) else old * factor}

    return change


def width(factor: float) -> Callable[[Values], Values]:
    """Return the change of the width, by the number of heads: their own width stays."""

    def change(values: Values) -> Values:
        heads = max(1, round(values["n_head"] * factor))
        return {"n_head": heads, "n_embd": heads * values["n_embd"] // values["n_head"]}

    return change


def context(factor: float) -> Callable[[Values], Values]:
    """Return the change of the context, with as many tokens a step, if the batch can have them."""

    def change(values: Values) -> Values:
        length = round(values["max_length"] * factor)
        batch = max(1, round(values["batch_size"] / factor))
        return {"max_length": length, "max_position_embeddings": length, "batch_size": batch}

    return change


def vocabulary(values: Values) -> Values:
    """Return the other kind of tokens: a BPE for bytes, bytes for a BPE."""
    if "eval_files" not in values:
        return {}
    return {"encoding": "bpe", "vocab_size": 2048} if values["encoding"] == "bytes" else {"encoding": "bytes"}


CHANGES: dict[str, Callable[[Values], Values]] = {
    "half the width": width(0.5),
    "0.75 of the width": width(0.75),
    "1.5 of the width": width(1.5),
    "twice the width": width(2),
    "half the layers": times("n_layer", 0.5),
    "1.5 of the layers": times("n_layer", 1.5),
    "twice the layers": times("n_layer", 2),
    "half the matrices' rate": times("muon_learning_rate", 0.5),
    "twice the matrices' rate": times("muon_learning_rate", 2),
    "half the other rate": times("learning_rate", 0.5),
    "twice the other rate": times("learning_rate", 2),
    "the other momentum": lambda values: {"muon_momentum": 0.95 if values["muon_momentum"] == 0.85 else 0.85},
    "half the batch": times("batch_size", 0.5),
    "twice the batch": times("batch_size", 2),
    "half the context": context(0.5),
    "twice the context": context(2),
    "dropout 0.1 more": lambda values: {"dropout": values["dropout"] + 0.1, "attn_pdrop": 0.0},
    "dropout 0.1 less": lambda values: {"dropout": max(0.0, values["dropout"] - 0.1)},
    "a tenth of the weight decay": times("weight_decay", 0.1),
    "ten times the weight decay": times("weight_decay", 10.0),
    "other tokens": vocabulary,
}


def runs_around(values: Values) -> dict[str, Values]:
    """Return the options of the plan and of each change that makes a difference, by name."""
    runs = {PLAN: values}
    for name, change in CHANGES.items():
        changed = {**values, **change(values)}
        if changed not in runs.values():
            runs[name] = changed
    return runs


# --- a run


def made(values: Values, plan: Values, options: argparse.Namespace) -> dict[str, Any]:
    """Train for as long as the plan takes; return the score on the whole held-out text."""
    changed = {name: value for name, value in values.items() if plan.get(name) != value}
    steps, ratio = plan["max_steps"], 1.0
    if changed.keys() - _NOT_OF_THE_TIME:
        taken = measure.interleaved(
            {"plan": step_of(plan, options), "run": step_of(values, options)}, options.rounds, options.device
        )
        ratio = measure.median_ratio(taken["run"], taken["plan"])
        steps = max(1, round(steps / ratio))
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": f"{folder}/run", "max_steps": steps, "eval_steps": steps, "save_steps": 10**9}
        quiet = {"sample_steps": 0, "report_to": ["none"], "overwrite": True}
        score = train(build_options(RunOptions, {**values, **own, **quiet}), stream=None).evaluation
    return {
        "steps": steps,
        "step_ratio": ratio,
        "loss": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "changed": changed,
        "versions": measure.versions("torch", "transformers"),
    }


def step_of(values: Values, options: argparse.Namespace) -> Callable[[], object]:
    """Return a training step of a run, always on the same batch of random ids."""
    chosen = build_options(RunOptions, {**values, "output_dir": "run"})
    n_vocab = choose_encoding(chosen.text, chosen.encoding).n_vocab
    torch.manual_seed(0)
    model = GPTKitForCausalLM(build_config(chosen.model, vocab_size=n_vocab))
    ids = torch.randint(n_vocab, (chosen.training.batch_size, chosen.windows.length + 1))
    trainer = AMPTrainer(
        model,
        create_optimizer(model, chosen.optimizer),
        mixed_precision=chosen.training.mixed_precision,
        accelerator=Accelerator(cpu=options.device == "cpu"),
    )
    compile_blocks(model, chosen.training.torch_compile, trainer.accelerator.device, print)
    return lambda: trainer.update([Batch(ids[:, :-1], ids[:, 1:])])


def report(facts: dict[str, Any], plan: dict[str, Any], results: studies.Results) -> None:
    """Print the runs so far, the best first, and how far the plan is from the best."""
    runs = results.find(**facts)
    rows = [
        [run["run"], run["steps"], f"{run['step_ratio']:.2f}", f"{run['bits_per_byte']:.4f}"]
        for run in sorted(runs, key=lambda run: run["bits_per_byte"])
    ]
    print()
    measure.show(rows, ["run", "steps", "a step", "bits per byte"])
    own = results.find(**facts, run=PLAN)
    if own:
        reached, others = own[0]["bits_per_byte"], [run["bits_per_byte"] for run in runs]
        print(
            f"the plan expected {plan['expected']:.3f} bits per byte and reached {reached:.4f}: "
            f"{reached / min(others) - 1:.2%} above the best of {len(others)} runs, whose median is "
            f"{statistics.median(others):.4f}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
