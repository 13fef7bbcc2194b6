"""The loss curve of a run as a picture."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.storage.atomic_files import replace_file
from gpt_kit_hf.storage.run_history import RunHistory
from gpt_kit_hf.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Floats = npt.NDArray[np.float64]
_RAW, _SMOOTH, _EVAL, _BASELINE = "#b8c4d6", "#2b5c9e", "#c8452d", "#6b7280"
_WIDEST = 1 / 50  # of the curve: the smoothing window to each side
_NEAREST = 1 / 5  # of the distance to the first step: the window there


def draw_curve(run: RunHistory, path: Path) -> bool:
    """Write `loss_figure` as a PNG file; return False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    picture = io.BytesIO()
    loss_figure(run).savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    return True


def loss_figure(run: RunHistory) -> Figure:
    """Return a figure of the training and evaluation loss over steps and tokens, with the best checkpoint.

    Once the run knows them, there is an axis in bits per byte, and lines for gzip and the frequencies of bytes where
    they are within the range of the losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"{run.name}: loss", fontsize="medium", fontweight="bold", loc="left")
    axes.grid(alpha=0.25)
    if _draw_losses(axes, run):
        axes.legend(frameon=False, loc="upper right")
    axes.set_xlim(left=0)
    _add_tokens(axes, run)
    _add_bits_per_byte(axes, run)
    for each in figure.axes:
        each.spines[["top", "right"]].set_alpha(0.3)
    return figure


def smoothed(values: Sequence[float] | _Floats) -> _Floats:
    """Return the value at each place of the line that fits the values around it, (N,) -> (N,).

    The window reaches a fiftieth of the curve to each side, and less near the start, where a loss falls so fast that
    an average would run above it. A line has no lag, so the end needs no values after it.
    """
    heights = np.asarray(values, dtype=np.float64)
    places = np.arange(len(heights), dtype=np.float64)
    reach = np.minimum(max(1, round(len(heights) * _WIDEST)), (places * _NEAREST).astype(np.int64))
    first = np.arange(len(heights)) - reach
    end = np.minimum(np.arange(len(heights)) + reach, len(heights) - 1) + 1

    def sums(terms: _Floats) -> _Floats:
        totals = np.concatenate([[0.0], np.cumsum(terms)])
        return np.asarray(totals[end] - totals[first])

    # Around the middle of all: the differences of large sums would round.
    middle, level = (len(heights) - 1) / 2, heights.mean() if len(heights) else 0.0
    x, y = places - middle, heights - level
    count = (end - first).astype(np.float64)
    mean_x, mean_y = sums(x) / count, sums(y) / count
    spread = sums(x * x) / count - mean_x**2
    slope = np.divide(sums(x * y) / count - mean_x * mean_y, spread, out=np.zeros_like(x), where=count > 1)
    return np.asarray(mean_y + slope * (x - mean_x) + level)


def _draw_losses(axes: Axes, run: RunHistory) -> bool:
    """Draw the losses and the best checkpoint; return whether there were any."""
    train, scored = run.series["loss"], run.series["eval_loss"]
    steps, losses = np.array(train.steps), np.array(train.values)
    finite = np.isfinite(losses)
    if finite.any():
        axes.plot(steps[finite], losses[finite], color=_RAW, linewidth=0.8, label="training, each step")
        axes.plot(steps[finite], smoothed(losses[finite]), color=_SMOOTH, linewidth=1.6, label="training, smoothed")
    if len(scored.steps):
        axes.plot(
            scored.steps, scored.values, color=_EVAL, marker="o", markersize=3.5, linewidth=1.2, label="held-out text"
        )
    if run.best is not None:
        step, loss = run.best
        label = f"best checkpoint: step {step:,}, {loss:.3f}"
        axes.plot([step], [loss], color=_EVAL, marker="*", markersize=13, linestyle="none", label=label, zorder=5)
    return bool(finite.any() or len(scored.steps))


def _add_tokens(axes: Axes, run: RunHistory) -> None:
    """Add an axis in trained tokens above the axis in steps."""
    from matplotlib.ticker import MaxNLocator

    train = run.series["loss"]
    if not run.trained_tokens:
        return
    steps, tokens = np.array([0, *train.steps]), np.array([0, *train.tokens])
    above = axes.twiny()
    above.set_xlim(axes.get_xlim())
    wanted: _Floats = np.asarray(MaxNLocator(6, integer=True).tick_values(0, run.trained_tokens))
    wanted = wanted[wanted <= run.trained_tokens]
    above.set_xticks(np.interp(wanted, tokens, steps), [short(each) for each in wanted])
    above.set_xlabel("trained tokens")


def _add_bits_per_byte(axes: Axes, run: RunHistory) -> None:
    """Add an axis in bits per byte of the held-out text, and the lines of the baselines that are in view."""
    if run.bytes_per_token is None:
        return
    nats = math.log(2) * run.bytes_per_token  # of a bit per byte

    def to_bits(loss: Any) -> Any:
        return loss / nats

    def to_nats(bits: Any) -> Any:
        return bits * nats

    beside = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
    beside.set_ylabel("bits per byte")
    low, high = axes.get_ylim()
    style: dict[str, Any] = {"color": _BASELINE, "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 1}
    for name, bits in run.baselines.items():
        if low < bits * nats < high:
            axes.axhline(bits * nats, **style)
            axes.annotate(
                f"{name}: {bits:.2f} bits per byte",
                (0.99, bits * nats),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                fontsize="small",
                color=_BASELINE,
            )
    axes.set_ylim(low, high)
