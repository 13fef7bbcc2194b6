"""What all programs here share: interleaved timing, the machine's ceilings, and what ran."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add what every program takes."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns that each of them takes")
    parser.add_argument("--json", help="write the figures to this file, too")


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: str, warm_up: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of each call, {variant: [of round 1, ...]}: in each round all take their turn.

    What else the machine does then meets all of them alike. The first `warm_up` rounds, in which memory is allocated
    and compilers work, are left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm_up + rounds):
        for name, call in variants.items():
            synchronise(device)
            began = time.perf_counter()
            call()
            synchronise(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def in_a_process(*more: str) -> dict[str, float]:
    """Run this program once more with the same options and some more; return the JSON of the last line it prints."""
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], *more]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise SystemExit(f"with {' '.join(more)} it failed:\n{said.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(said.stdout.strip().splitlines()[-1])
    return figures


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return the median of the rounds' ratios: within a round both met the same machine."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def matrix_ceiling(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Return FLOP/s of a large square matrix product: what no training step of this precision exceeds."""
    size = size or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    taken = interleaved({"product": lambda: torch.mm(a, b, out=out)}, 9, device)["product"]
    return 2 * size**3 / min(taken)


def bandwidth_ceiling(device: str) -> float:
    """Return bytes/s of reading memory that no cache holds: what no reading of weights exceeds."""
    numbers = torch.ones((1 << 30) // 4 if device == "cuda" else (1 << 28) // 4, device=device)
    taken = interleaved({"sum": numbers.sum}, 9, device)["sum"]
    return numbers.nbytes / min(taken)


def machine(device: str) -> str:
    """Return in one line on what this runs."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions(*packages: str) -> str:
    """Return in one line which Python and packages run."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def show(rows: Sequence[Sequence[object]], headings: Sequence[str]) -> None:
    """Print a table."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def keep(file: str | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON if a file was asked for."""
    if file:
        Path(file).write_text(json.dumps(figures, indent=1) + "\n")
