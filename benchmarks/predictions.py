"""How well a run predicts what it takes: time and peak memory said before the first step, beside those measured.

`python benchmarks/predictions.py tinyshakespeare.txt --rows instructions.json` trains models of six shapes, and
finetunes one of them in full, packed and padded, and by LoRA, each with one thread and with two, in each precision,
and in a process of its own. Time is from the prediction to the end of the run; memory is the most that the process
held, as the system counts it. Other work on the machine changes how long a run takes behind its prediction, so steps
are also predicted and taken in turns, in fp32, in one process for each shape. Runs that the file of results has are
not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import measure
import studies
import torch
from accelerate import Accelerator

from gpt_kit_hf import (
    AMPTrainer,
    GPTKitForCausalLM,
    ModelOptions,
    OptimizerOptions,
    create_optimizer,
    get_encoding,
)
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.training.needs.cost import measure_cost, random_rows
from gpt_kit_hf.training.runtime.memory import reuse_freed_memory

# Layers, width, heads, context, batch, micro-batch, optimizer, encoding, steps.
SHAPES: dict[str, tuple[int, int, int, int, int, int, str, str, int]] = {
    "xs, bytes": (4, 128, 4, 256, 8, 8, "adamw", "bytes", 200),
    "small, bytes": (4, 256, 4, 128, 8, 8, "adamw", "bytes", 120),
    "small, muon": (4, 256, 4, 128, 8, 4, "muon", "bytes", 120),
    "deep, bytes": (8, 192, 6, 128, 8, 4, "adamw", "bytes", 120),
    "wide, short": (4, 512, 8, 64, 8, 8, "muon", "bytes", 100),
    "gpt2's vocabulary": (2, 128, 4, 128, 8, 4, "adamw", "gpt2", 80),
}
TURNS, STEPS_OF_A_TURN = 8, 6
FINETUNED = {"in full": (), "in full, padded": ("--packing", "false"), "LoRA": ("--lora_r", "8")}
BASE = "small, bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare.txt")
    parser.add_argument("--rows", help="instruction rows; without them nothing is finetuned")
    parser.add_argument("--results", default="runs/predictions.jsonl", help="file of the runs; those in it are kept")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", choices=[*SHAPES, *FINETUNED], default=[*SHAPES, *FINETUNED])
    parser.add_argument("--worker", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(steps_of(options.worker, options.threads[0])))
        return
    results = studies.Results(options.results)
    print(f"machine  {measure.machine('cpu')}; {measure.versions('torch', 'transformers')}")
    for threads, name in itertools.product(options.threads, options.only):
        facts = {"run": name, "threads": threads}
        for precision in options.precisions if name in SHAPES or options.rows else []:
            run = {"study": "predictions", **facts, "precision": precision}
            if not results.find(**run):
                with tempfile.TemporaryDirectory() as folder:
                    results.add(run, made(name, threads, precision, options, Path(folder)))
        step = {"study": "predicted steps", **facts}
        if name in SHAPES and not results.find(**step):
            results.add(step, measure.in_a_process("--worker", name, "--threads", str(threads)))
    report(results)


def made(name: str, threads: int, precision: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make one run; return what it predicted, and what it took."""
    if name in SHAPES:
        return taken([*training(name, options, folder / "run"), "--mixed_precision", precision], threads)
    base = folder / "base"
    command = training(BASE, options, base)
    command[command.index("--max_steps") + 1] = "2"
    command[command.index("--max_length") + 1] = "512"
    taken([*command, "--max_position_embeddings", "512", "--mixed_precision", "fp32"], threads)
    return taken(
        [
            *("finetune", "--model_name_or_path", str(base), "--rows", options.rows, "--max_length", "512"),
            *FINETUNED[name],
            *("--batch_size", "4", "--max_steps", "200", "--max_eval_samples", "32"),
            *("--output_dir", str(folder / "run"), "--report_to", "none", "--mixed_precision", precision),
        ],
        threads,
    )


def steps_of(name: str, threads: int) -> dict[str, list[float]]:
    """Return the seconds that a step is predicted to take, and takes, of each turn."""
    torch.set_num_threads(threads)
    reuse_freed_memory()  # as `gpt-kit train` does
    layers, width, heads, context, batch, micro_batch, optimizer, encoding, _ = SHAPES[name]
    vocabulary = get_encoding(encoding).n_vocab
    shape = ModelOptions(
        model="modern-xs", n_layer=layers, n_head=heads, n_embd=width, max_position_embeddings=context
    )  # fmt: skip
    model = GPTKitForCausalLM(build_config(shape, vocab_size=vocabulary))
    trainer = AMPTrainer(
        model,
        create_optimizer(model, OptimizerOptions(optimizer=optimizer)),
        accelerator=Accelerator(cpu=True),
        mixed_precision="fp32",
    )
    rows, micro_steps = random_rows(vocabulary, context), batch // micro_batch
    batches = [rows(micro_batch)] * micro_steps
    found: dict[str, list[float]] = {"predicted": [], "took": []}
    for turn in range(TURNS):
        cost = measure_cost(
            model, trainer.optimizer.optimizer, rows, micro_batch_size=micro_batch, micro_steps=micro_steps
        )
        found["predicted"].append(cost.seconds)
        if turn == 0:
            trainer.update(batches)  # makes the optimizer's state
        began = time.perf_counter()
        for _ in range(STEPS_OF_A_TURN):
            trainer.update(batches)
        found["took"].append((time.perf_counter() - began) / STEPS_OF_A_TURN)
    return found


def training(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    layers, width, heads, context, batch, micro_batch, optimizer, encoding, steps = SHAPES[name]
    return [
        *("train", "--text_files", options.text, "--encoding", encoding, "--output_dir", str(folder)),
        *("--model", "modern-xs", "--n_layer", str(layers), "--n_embd", str(width), "--n_head", str(heads)),
        *("--max_length", str(context), "--batch_size", str(batch), "--optimizer", optimizer),
        *("--per_device_train_batch_size", str(micro_batch), "--max_steps", str(steps), "--report_to", "none"),
        *("--eval_fraction", "0.01", "--max_eval_samples", "32"),
    ]


def taken(command: list[str], threads: int) -> dict[str, Any]:
    """Run `gpt-kit` in a process; return its prediction, and the seconds and bytes that it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    said = Path(tempfile.mkstemp()[1])
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpt_kit_hf.commands.main", *command, "--log_format", "json"],
            stdout=output, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    events = [json.loads(line) for line in said.read_text().splitlines() if line.startswith("{")]
    said.unlink()
    if process.returncode:
        raise SystemExit(f"gpt-kit {' '.join(command)} failed: {events[-1:]}")
    at = {event["event"]: event for event in events}
    ended, began = (datetime.fromisoformat(at[name]["time"]) for name in ("finish", "needs"))
    speeds = [event["tokens_per_second"] for event in events if event["event"] == "step"]
    return {
        "predicted": {name: at["needs"][name] for name in ("seconds", "memory_bytes", "step_seconds")},
        "seconds": (ended - began).total_seconds(),
        "memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "tokens_per_second": speeds,
        "versions": measure.versions("torch", "transformers"),
    }


def report(results: studies.Results) -> None:
    """Print the table of all runs in the results."""
    rows, steps, errors = [], list[list[object]](), {"seconds": list[float](), "memory_bytes": list[float]()}
    for found in results.find(study="predictions"):
        predicted = found["predicted"]
        ratios = {name: predicted[name] / found[name] for name in ("seconds", "memory_bytes")}
        for name, ratio in ratios.items():
            errors[name].append(abs(ratio - 1.0))
        rows.append(
            [
                found["run"],
                found["threads"],
                found["precision"],
                f"{predicted['seconds']:.0f} s",
                f"{found['seconds']:.0f} s",
                f"{ratios['seconds']:.2f}",
                f"{predicted['memory_bytes'] / 1e6:,.0f} MB",
                f"{found['memory_bytes'] / 1e6:,.0f} MB",
                f"{ratios['memory_bytes']:.2f}",
            ]
        )
    measure.show(rows, ["run", "threads", "precision", "predicted", "took", "ratio", "predicted", "took", "ratio"])
    for found in results.find(study="predicted steps"):
        predicted, took = (statistics.mean(found[name]) for name in ("predicted", "took"))
        steps.append([found["run"], found["threads"], f"{predicted:.3f}", f"{took:.3f}", f"{predicted / took:.2f}"])
        errors.setdefault("seconds of a step", []).append(abs(predicted / took - 1.0))
    measure.show(steps, ["step of", "threads", "predicted", "took", "ratio"])
    for name, found in errors.items():
        print(f"{name}: off by {statistics.median(found):.1%} in the median, {max(found):.1%} at most")


if __name__ == "__main__":
    main()
