"""Where a token stands: embeddings of positions. This file is copied into saved model folders as remote code.

Shapes: B batch size, T tokens of a row, D model width, H heads, Dh head width.
"""

import math

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


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


class RotaryEmbedding(nn.Module):
    """The angles of rotary positions: position ids (B, T) -> cosine and sine (B, T, Dh).

    Entry i and entry i + Dh/2 of a head are turned by the angle p / theta^(2i/Dh) at position p: Su et al. 2021,
    "RoFormer", section 3.2.2, with the pairs as in Llama. The scalings of `rope_parameters` are transformers'.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config

    def rates(self, device: torch.device) -> tuple[Tensor, float]:
        """Return the angle of position 1 for each pair (Dh/2,), and the factor of cosine and sine.

        Computed anew each time: `model.bfloat16()` would round a buffer, and so the angles of all later positions.
        """
        kind, width = self.config.rope_parameters["rope_type"], self.config.head_dim
        if kind != "default":
            rates, factor = ROPE_INIT_FUNCTIONS[kind](self.config, device)
            return rates, float(factor)
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1.0 / self.config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the cosine and the sine of the angles (B, T, Dh), computed in float32."""
        rates, factor = self.rates(position_ids.device)
        angles = position_ids[..., None].float() * rates  # (B, T) -> (B, T, Dh/2)
        angles = torch.cat((angles, angles), dim=-1)  # -> (B, T, Dh)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs (i, i + Dh/2) of queries or keys (B, H, T, Dh) by the angles of their positions (B, T, Dh).

    The result has the type of `heads`, which autocast may have lowered: attention wants one type of all its inputs.
    """
    first, second = heads.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return (heads * cosine[:, None] + quarter_turn * sine[:, None]).to(heads.dtype)


def constants_device() -> torch.device:
    """Return torch's default device, or the CPU for the meta device: no checkpoint holds what is computed here."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else torch.get_default_device()
