"""The loss curve of a run as a picture."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_kit_hf.storage.atomic_files import replace_file


def draw_curve(records: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw training and eval loss over the steps, from the lines of metrics.jsonl; return False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    evaluated = [(r["step"], r["loss"]) for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="train, each step")
        axes.plot(steps, _smooth(losses), color="#2b5c9e", linewidth=1.6, label="train, smoothed")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color="#c8452d", marker="o", markersize=4, label="eval")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if train or evaluated:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average with a half-life of a fiftieth of the curve, corrected for its start."""
    keep = 0.5 ** (50 / max(50, len(values)))
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        smoothed.append(total / weight)
    return smoothed
