"""Everything that only a GPU can show, in about ten minutes: `make gpu`.

`python benchmarks/gpu.py` runs, one after the other, each in a process and with a time limit:

- profile: a training step of GPT-2 (124M), vocabulary 50,257 and 50,304: how often it waits for the device, its
  kernels by kind, products of unaligned rows, which attention runs;
- train_step: the same step beside the compiled loop by hand;
- repeat: two equal runs of 30 steps, without and with `--deterministic`, compared to the bit, and `verify --replay`;
- generate: tokens/s of the decoder beside transformers;
- xl: a step of gpt2-xl, its time and memory;
- tests: those marked `gpu`.

It writes `benchmarks/results/gpu-NAME.json`, and the table of docs/speed.md from all such files. A part that fails is
recorded with its last lines, and the others go on. `--parts` chooses some; `--device cpu --shape tiny` tries the
program itself on a machine without a GPU, and writes nothing but `--json`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import measure
import peers
import torch

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "speed.md"
BEGIN, END = "<!-- figures of GPUs: written by benchmarks/gpu.py -->", "<!-- end of the figures of GPUs -->"
# bf16 products with fp32 sums of dense matrices, FLOP/s, by the data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
# Kernels by parts of their names; the first that fits counts.
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "products": ("gemm", "cutlass", "nvjet", "sm90_xmma", "ampere_", "cublas", "splitk"),
    "optimizer": ("adam", "multi_tensor", "foreach", "lpnorm"),
    "copies": ("memcpy", "memset", "copy"),
}
UNALIGNED = re.compile(r"align[12](\D|$)")
SECONDS = {"profile": 150, "train_step": 150, "repeat": 240, "generate": 120, "xl": 150, "tests": 240}
BATCHES = {"gpt2": 32, "tiny": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program")
    parser.add_argument("--shape", default="gpt2", choices=BATCHES)
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("--worker", choices=["profile", "repeat", "xl"], help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=50257, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU is available to torch: nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    if options.worker:
        work = {"profile": profile, "repeat": repeat, "xl": xl}[options.worker]
        print(json.dumps(work(options)))
        return
    figures = {"machine": facts(options.device)} | {part: run(part, options) for part in options.parts}
    measure.keep(options.json, figures)
    if options.device == "cuda":
        record(figures)
    print(json.dumps(figures, indent=1))


def facts(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": measure.machine(device), "versions": measure.versions("torch", "transformers")}
    if device == "cuda":
        found |= {"cuda": torch.version.cuda, "memory": torch.cuda.get_device_properties(0).total_memory}
    return found


def run(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part in processes; return what they found, or the end of what the one that failed has said."""
    began, found = time.perf_counter(), dict[str, Any]()
    print(f"{part} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(part, options, Path(folder) / "figures.json").items():
            try:
                said = subprocess.run(
                    command, capture_output=True, text=True, timeout=SECONDS[part], cwd=HERE.parent, check=False
                )
            except subprocess.TimeoutExpired:
                found[name] = {"failed": f"not done after {SECONDS[part]} s"}
                continue
            file = Path(folder) / "figures.json"
            if said.returncode:
                found[name] = {"failed": (said.stdout + said.stderr).splitlines()[-15:]}
            elif part == "tests":
                found[name] = {"tests": said.stdout.strip().splitlines()[-1]}
            else:
                found[name] = json.loads(file.read_text() if file.exists() else said.stdout.splitlines()[-1])
            file.unlink(missing_ok=True)
    return {**found, "seconds": round(time.perf_counter() - began)}


def commands(part: str, options: argparse.Namespace, file: Path) -> dict[str, list[str]]:
    """Return the command of each process of a part."""
    device, shape, tiny = options.device, options.shape, options.shape == "tiny"
    work = ["--device", device, "--shape", shape, "--context", "64" if tiny else "1024", "--json", str(file)]
    precision = ["--precision", "fp32" if device == "cpu" else "bf16"]
    own = [sys.executable, str(Path(__file__).resolve()), "--device", device, "--shape", shape, "--worker", part]
    if part == "profile":
        return {str(vocabulary): [*own, "--vocabulary", str(vocabulary)] for vocabulary in (50257, 50304)}
    if part == "train_step":
        only = ["--only", "gpt_kit_hf", "by hand, compiled", "--batch", str(BATCHES[shape]), "--rounds", "20"]
        return {"step": [sys.executable, str(HERE / "train_step.py"), *work, *precision, *only]}
    if part == "generate":
        new = ["--new", "8" if tiny else "512", "--without_llama_cpp"]
        rows = {"one row": "1", "32 rows": "32"}
        program = [sys.executable, str(HERE / "generate.py"), *work, *precision, *new]
        return {name: [*program, "--batch", count] for name, count in rows.items()}
    if part == "tests":
        return {"marked gpu": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]}
    return {part: own}


# --- the parts that are programs of their own here


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Return what three steps do on the device, after five that compile and allocate."""
    work = work_of(options)
    step, batches = peers.STEPS["gpt_kit_hf"](work), list(peers.batches_of(work, 8))
    for batch in batches[:5]:
        step(*batch)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if work.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if work.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        began = time.perf_counter()
        with torch.profiler.profile(activities=activities) as profiler:
            for batch in batches[5:]:
                step(*batch)
            measure.synchronise(work.device)
        seconds = time.perf_counter() - began
        if work.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    said = [str(wait.message) for wait in waits if "synchroniz" in str(wait.message).lower()]
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total]
    return {
        "waits_per_step": len(said) / 3,
        "seconds_per_step_profiled": seconds / 3,
        "kernels_per_step": sum(event.count for event in kernels) / 3,
        "milliseconds_per_step": by_kind(kernels),
        "unaligned": sorted({event.key[:120] for event in kernels if UNALIGNED.search(event.key)}),
        "attention": sorted({event.key[:120] for event in kernels if kind_of(event.key) == "attention"}),
        "slowest": [
            [event.key[:120], event.count / 3, event.self_device_time_total / 3e3]
            for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:15]
        ],
    }


def kind_of(kernel: str) -> str:
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


def by_kind(kernels: Iterable[Any]) -> dict[str, float]:
    """Return the milliseconds of a step by kind of kernel."""
    found: dict[str, float] = {}
    for event in kernels:
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + event.self_device_time_total / 3e3
    return found


def repeat(options: argparse.Namespace) -> dict[str, Any]:
    """Make a run twice, without and with `--deterministic`; return where the two differ, and what a replay says."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, more in (("as it is", []), ("deterministic", ["--deterministic"])):
            runs = [Path(folder) / f"{name} {number}" for number in (1, 2)]
            for place in runs:
                train = ["train", "--text_files", "python-stdlib", "--output_dir", str(place), "--max_steps", "30"]
                rest = ["--save_steps", "10", "--sample_steps", "0", "--eval_steps", "30", "--encoding", "bytes"]
                on = ["--use_cpu", "--n_layer", "1"] if options.device == "cpu" else []
                gpt_kit(*train, *rest, *on, *more)
            one, two = ([(line["loss"], line["grad_norm"]) for line in steps_of(place)] for place in runs)
            differ = [step for step, (a, b) in enumerate(zip(one, two, strict=True), 1) if a != b]
            replayed = gpt_kit("verify", str(runs[0]), "--replay", "11:30", may_fail=True)
            found[name] = {"first_step_that_differs": differ[0] if differ else None, "replay": replayed[-1]}
    return found


def gpt_kit(*arguments: str, may_fail: bool = False) -> list[str]:
    """Run a command of the package; return its lines."""
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (said.stdout + said.stderr).strip().splitlines()
    if said.returncode and not may_fail:
        raise SystemExit("\n".join(lines[-10:]))
    return lines


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def xl(options: argparse.Namespace) -> dict[str, Any]:
    """Return time and memory of a step of gpt2-xl (1.5B), 8 rows of 1,024 tokens."""
    options.shape = "tiny" if options.device == "cpu" else "gpt2-xl"
    work = work_of(options, batch=8)
    step, batches = peers.STEPS["gpt_kit_hf"](work), list(peers.batches_of(work, 6))
    for batch in batches[:3]:
        step(*batch)
    measure.synchronise(work.device)
    began = time.perf_counter()
    for batch in batches[3:]:
        step(*batch)
    measure.synchronise(work.device)
    seconds = (time.perf_counter() - began) / 3
    most = torch.cuda.max_memory_allocated() if work.device == "cuda" else None
    return {"seconds": seconds, "tokens_per_second": work.tokens / seconds, "peak_memory": most}


def work_of(options: argparse.Namespace, batch: int | None = None) -> peers.Work:
    cpu = options.device == "cpu"
    chosen = argparse.Namespace(
        device=options.device, shape=options.shape, context=64 if cpu else 1024, vocabulary=options.vocabulary,
        batch=batch or BATCHES[options.shape], precision="fp32" if cpu else "bf16",
    )  # fmt: skip
    return peers.work_of(chosen)


# --- what is kept


def record(figures: Mapping[str, Any]) -> None:
    """Write the figures of this GPU, and the table of the docs from all such files; keep what was measured before."""
    name = re.sub(r"[^a-z0-9]+", "-", figures["machine"]["name"].lower()).strip("-")
    file = HERE / "results" / f"gpu-{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    measure.keep(str(file), {**before, **figures})
    found = [json.loads(path.read_text()) for path in sorted(file.parent.glob("gpu-*.json"))]
    page = PAGE.read_text(encoding="utf-8")
    first, last = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:first] + "\n" + table(found) + page[last:], encoding="utf-8")


def table(all_figures: Iterable[Mapping[str, Any]]) -> str:
    """Return a row of Markdown for each GPU."""
    lines = [
        "| GPU | 124M, bf16: tokens/s | share of the data sheet's FLOP/s | the compiled loop by hand takes | tokens/s "
        "decoded, one row | gpt2-xl: tokens/s, memory |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(row, all_figures)]) + "\n"


def row(figures: Mapping[str, Any]) -> str:
    """Return the row of a GPU; a part that is missing or failed is a dash."""
    name = figures["machine"]["name"]
    steps = figures.get("train_step", {}).get("step", {}).get("steps", {})
    ours, by_hand = steps.get("gpt_kit_hf"), steps.get("by hand, compiled")
    decoded = figures.get("generate", {}).get("one row", {}).get("methods", {}).get("gpt_kit_hf, dtype auto")
    large = figures.get("xl", {}).get("xl", {})
    cells = [name, *["-"] * 5]
    if ours:
        cells[1], cells[2] = f"{ours['tokens_per_second']:,.0f}", share(name, ours["tokens_per_second"])
    if by_hand:
        cells[3] = f"{by_hand['ratio']:.2f} times as long"
    if decoded:
        cells[4] = f"{decoded['tokens_per_second']:,.0f}"
    if large.get("peak_memory"):
        cells[5] = f"{large['tokens_per_second']:,.0f}, {large['peak_memory'] / 1e9:.0f} GB"
    return f"| {' | '.join(cells)} |"


def share(name: str, tokens_per_second: float) -> str:
    """Return the share of the GPU's peak that GPT-2's training reaches, by the products of `Work.flop`."""
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    if peak is None:
        return "-"
    options = argparse.Namespace(device="cuda", shape="gpt2", vocabulary=50257)
    work = work_of(options)
    parameters = 124_439_808
    return f"{work.flop(parameters) / work.tokens * tokens_per_second / peak:.0%}"


if __name__ == "__main__":
    main()
