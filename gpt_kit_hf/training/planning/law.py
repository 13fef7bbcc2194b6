"""How good a model becomes: bits per byte by its size, the length of training and the size of the text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt_kit_hf.text import short


@dataclass(frozen=True)
class Law:
    """Bits per byte relative to gzip's, as a sum of powers (Hoffmann et al. 2022, "Training Compute-Optimal LLMs").

    The ratio is size * N**-size_power + length * D**-length_power, N the parameters of the blocks and D the tokens
    seen, both in millions. Text that is repeated counts less and less (Muennighoff et al. 2023, "Scaling
    Data-Constrained Language Models"): `repeats` is how many passes over it are worth most of what repeating brings.
    """

    size: float
    size_power: float
    length: float
    length_power: float
    repeats: float

    def bits_per_byte(self, gzip: float, *, parameters: float, seen: float, text: float) -> float:
        """Return the bits per byte of held-out text; `seen` and `text` are tokens, trained on and different ones."""
        size, length = self._terms(parameters, seen, text)
        return float(gzip * (size + length))

    def gains(self, *, parameters: float, seen: float, text: float) -> tuple[float, float]:
        """Return by how much the ratio falls if the parameters grow, and if the text seen grows, by a small factor."""
        size, length = self._terms(parameters, seen, text)
        return self.size_power * size, self.length_power * length

    def _terms(self, parameters: float, seen: float, text: float) -> tuple[float, float]:
        epochs = seen / text
        worth = seen if epochs <= 1 else text * (1 + self.repeats * (1 - math.exp(-(epochs - 1) / self.repeats)))
        size = self.size * (parameters / 1e6) ** -self.size_power
        return size, self.length * (worth / 1e6) ** -self.length_power


@dataclass(frozen=True)
class Range:
    """The runs that the law was fitted to: (fewest, most) parameters of the blocks, and tokens seen."""

    parameters: tuple[float, float]
    seen: tuple[float, float]

    def holds(self, parameters: float, seen: float) -> bool:
        """Return whether a run lies within the range, or no more than four times outside of it."""
        pairs = ((self.parameters, parameters), (self.seen, seen))
        return all(low / 4 <= value <= 4 * high for (low, high), value in pairs)

    def told(self) -> str:
        """Return the range in words."""
        (smallest, largest), (least, most) = self.parameters, self.seen
        return (
            f"the law was measured with {short(smallest)} to {short(largest)} parameters in the layers and "
            f"{short(least)} to {short(most)} tokens seen"
        )


# By `python benchmarks/scaling.py`; the runs are in benchmarks/results/scaling.jsonl. DEVIATION is the standard
# deviation of the logarithm.
LAW = Law(size=0.3595, size_power=0.1148, length=0.3485, length_power=0.2868, repeats=2.6768)
DEVIATION = 0.046
MEASURED = Range((98_304, 3_145_728), (123e3, 3.3e6))


def layer_parameters(layers: int, width: int) -> int:
    """Return the parameters of the blocks of a modern shape: 4 and 8 squares of the width in each block."""
    return 12 * layers * width**2
