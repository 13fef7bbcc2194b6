"""How good a model becomes: bits per byte by its size, the length of training and the size of the text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt_kit_hf.text import short


@dataclass(frozen=True, kw_only=True)
class Law:
    """Bits per byte, as a sum of powers (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models").

    They are gzip**gzip_power * (floor + size * N**-size_power + length * D**-length_power), with what gzip -9 needs
    for held-out text with a window of 1 KB, N the parameters of the blocks and D the tokens seen, both in millions.
    Text that is repeated counts less and less (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models"):
    `repeats` is how many passes over it are worth most of what repeating brings.
    """

    gzip_power: float
    floor: float
    size: float
    size_power: float
    length: float
    length_power: float
    repeats: float

    @property
    def most_epochs(self) -> float:
        """The passes over a text after which more of them bring less than a fiftieth of what repeating it can."""
        return 1 + 4 * self.repeats

    def bits_per_byte(self, gzip: float, *, parameters: float, seen: float, text: float) -> float:
        """Return the bits per byte of held-out text; `seen` and `text` are tokens, trained on and different ones."""
        return float(gzip**self.gzip_power * sum(self.terms(parameters=parameters, seen=seen, text=text)))

    def terms(self, *, parameters: float, seen: float, text: float) -> tuple[float, float, float]:
        """Return the summands: floor, size, length."""
        again = max(0.0, seen / text - 1)
        worth = seen if again == 0 else text * (1 + self.repeats * (1 - math.exp(-again / self.repeats)))
        size = self.size * (parameters / 1e6) ** -self.size_power
        return self.floor, size, self.length * (worth / 1e6) ** -self.length_power


@dataclass(frozen=True)
class Range:
    """The runs that the law was fitted to: (fewest, most) parameters of the blocks, and tokens seen."""

    parameters: tuple[float, float]
    seen: tuple[float, float]

    def holds(self, parameters: float, seen: float) -> bool:
        """Return whether a run lies within the range, or no more than four times outside of it.

        But not with fewer tokens: a run of few steps is far worse than the law says.
        """
        fewest, most = self.parameters
        return fewest / 4 <= parameters <= 4 * most and self.seen[0] <= seen <= 4 * self.seen[1]

    def told(self) -> str:
        """Return the range in words."""
        (smallest, largest), (least, most) = self.parameters, self.seen
        return (
            f"the law was measured with {short(smallest)} to {short(largest)} parameters in the layers and "
            f"{short(least)} to {short(most)} tokens seen, by Muon"
        )


# By `python benchmarks/scaling.py --fit_only`, from the runs in benchmarks/results/; the powers of size and length are
# those of Hoffmann et al. 2022. DEVIATION is the root mean square of the logarithm of the error, of the runs of a text
# that the law is not fitted to.
LAW = Law(
    gzip_power=1.0982, floor=0.2621, size=0.0444, size_power=0.34, length=0.2158, length_power=0.28, repeats=1.5528
)
DEVIATION = 0.0688
MEASURED = Range((98_304, 4_718_592), (307_200, 7_829_504))


def layer_parameters(layers: int, width: int) -> int:
    """Return the parameters of the blocks of a modern shape: 4 and 8 squares of the width in each block."""
    return 12 * layers * width**2
