"""Where a token stands: embeddings of positions. This file is copied into saved model folders as remote code.

Shapes: B batch size, T tokens of a row, D model width.
"""

import math

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """A fixed position embedding: position ids (B, T) -> (B, T, D).

    Entry (p, 2i) is sin(p / 10000^(2i/D)), entry (p, 2i+1) is cos(p / 10000^(2i/D)): Vaswani et al. 2017, sec. 3.5.
    """

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.positions, self.width = positions, width
        self.register_buffer("weight", self.table().to(constants_device()), persistent=False)
        self.weight: Tensor

    def table(self) -> Tensor:
        """Return the values of the table (positions, D), computed on the CPU."""
        rates = torch.exp(torch.arange(0, self.width, 2, device="cpu") * (-math.log(10_000.0) / self.width))
        angles = torch.arange(self.positions, device="cpu")[:, None] * rates  # (positions, D/2)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # -> (positions, D)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the embedding of each position."""
        return nn.functional.embedding(position_ids, self.weight.to(position_ids.device))


def constants_device() -> torch.device:
    """Return torch's default device, or the CPU for the meta device: no checkpoint holds what is computed here."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else torch.get_default_device()
