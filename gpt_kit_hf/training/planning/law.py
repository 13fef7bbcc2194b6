"""How good a model becomes: bits per byte by its size, the length of training and the size of the text."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """Bits per byte relative to gzip's, as a sum of powers (Hoffmann et al. 2022, "Training Compute-Optimal LLMs").

    The ratio is floor + size * N**-size_power + length * D**-length_power, N the parameters of the blocks and D the
    bytes of text seen, both in millions. Text that is repeated counts less and less (Muennighoff et al. 2023, "Scaling
    Data-Constrained Language Models"): `repeats` is how many passes over it are worth most of what repeating brings.
    """

    floor: float
    size: float
    size_power: float
    length: float
    length_power: float
    repeats: float

    def bits_per_byte(self, gzip: float, *, parameters: float, seen: float, text: float) -> float:
        """Return the bits per byte of held-out text; `seen` and `text` are bytes, trained on and different ones."""
        epochs = seen / text
        worth = seen if epochs <= 1 else text * (1 + self.repeats * (1 - math.exp(-(epochs - 1) / self.repeats)))
        ratio = (
            self.floor
            + self.size * (parameters / 1e6) ** -self.size_power
            + self.length * (worth / 1e6) ** -self.length_power
        )
        return float(gzip * ratio)


@dataclass(frozen=True)
class Range:
    """The runs that the law was fitted to: up to so many parameters of the blocks and bytes seen."""

    parameters: float
    seen: float

    def holds(self, parameters: float, seen: float) -> bool:
        """Return whether a run lies within the range, or no more than four times beyond it."""
        return parameters <= 4 * self.parameters and seen <= 4 * self.seen

    def told(self) -> str:
        """Return the range in words."""
        return (
            f"the law was measured up to {self.parameters / 1e6:.0f}M parameters and {self.seen / 1e6:.0f} MB of text "
            "seen"
        )


# By `python benchmarks/scaling.py`; the runs are in benchmarks/results/scaling.jsonl. DEVIATION is the standard
# deviation of the logarithm.
LAW = Law(0.3, 0.15, 0.3, 0.25, 0.35, 8.0)
DEVIATION = 0.03
MEASURED = Range(3.2e6, 3.3e6)


def layer_parameters(layers: int, width: int) -> int:
    """Return the parameters of the blocks of a modern shape: 4 and 8 squares of the width in each block."""
    return 12 * layers * width**2
