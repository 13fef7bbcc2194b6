"""Draw the picture of docs/speed.md from the figures that the other programs wrote.

`python benchmarks/picture.py STEP.json MEMORY.json DECODE.json docs/images/speed.png`, of `train_step.py`,
`memory.py` and `generate.py` with `--json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

OURS, OTHERS = "#2a6f97", "#b8bfc6"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("step", "memory", "decode", "picture"):
        parser.add_argument(name)
    files = parser.parse_args()
    step, memory, decode = (json.loads(Path(file).read_text()) for file in (files.step, files.memory, files.decode))
    panels: list[tuple[str, Mapping[str, float], str]] = [
        (
            "Training, tokens/s",
            {name: figures["tokens_per_second"] for name, figures in step["steps"].items()},
            "{:,.0f}",
        ),
        ("Peak memory of a step, MB", {n: f["peak"] / 1e6 for n, f in memory["peaks"].items()}, "{:,.0f}"),
        (
            "Decoding 124M, tokens/s",
            {n: f["tokens_per_second"] for n, f in decode["methods"].items()},
            "{:.0f}",
        ),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 2.9), constrained_layout=True)
    for axis, panel in zip(axes, panels, strict=True):
        draw(axis, *panel)
    figure.savefig(files.picture, dpi=110)


def draw(axis: Any, title: str, values: Mapping[str, float], form: str) -> None:
    names = list(values)[::-1]
    colours = [OURS if name.startswith("gpt_kit_hf") else OTHERS for name in names]
    bars = axis.barh(
        [name.replace("gpt_kit_hf, ", "ours, ") for name in names], [values[n] for n in names], color=colours
    )
    axis.bar_label(bars, [form.format(values[name]) for name in names], padding=3, fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xticks([])
    axis.margins(x=0.16)
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    main()
