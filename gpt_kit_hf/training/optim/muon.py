"""torch's Muon, with all matrices of one shape orthogonalised together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon

# Numbers of a batch: enough for a device to be busy, and little memory beside the model's.
_MOST_NUMBERS = 1 << 24


class BatchedMuon(Muon):
    """Muon (Jordan et al. 2024) with torch's options, state and update; fewer and larger matrix products.

    Where torch takes one matrix after the other in bfloat16, this takes those of a shape as a batch, in bfloat16 on
    an accelerator and in float32 on a CPU, most of which compute bfloat16 many times slower.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all matrices that have a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices: list[Tensor] = []
            gradients: list[Tensor] = []
            means: list[Tensor] = []
            self._init_group(group, matrices, gradients, means)
            if matrices:
                self._update(group, matrices, gradients, means)
        return loss

    @staticmethod
    def _update(group: dict[str, Any], matrices: list[Tensor], gradients: list[Tensor], means: list[Tensor]) -> None:
        rate, momentum = float(group["lr"]), group["momentum"]
        torch._foreach_lerp_(means, gradients, 1.0 - momentum)
        updates = list(torch._foreach_lerp(gradients, means, momentum)) if group["nesterov"] else means
        torch._foreach_mul_(matrices, 1.0 - rate * group["weight_decay"])
        for indices in _batches(matrices):
            stacked = torch.stack([updates[index] for index in indices])  # (N, rows, columns)
            steps = orthogonalised(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
            shape = matrices[indices[0]].shape
            # torch's own choices of how a step depends on the shape, by their names there.
            scales = {"original": math.sqrt(max(1, shape[0] / shape[1])), "match_rms_adamw": 0.2 * max(shape) ** 0.5}
            scale = scales[group["adjust_lr_fn"] or "original"]
            torch._foreach_add_([matrices[index] for index in indices], list(steps.unbind()), alpha=-rate * scale)


def _batches(matrices: list[Tensor]) -> Iterator[list[int]]:
    """Yield numbers of matrices that are alike in shape, type and device, in batches of bounded size."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.dtype, matrix.device].append(index)
    for indices in alike.values():
        most = max(1, _MOST_NUMBERS // matrices[indices[0]].numel())
        yield from (indices[first : first + most] for first in range(0, len(indices), most))


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return matrices of about the same singular vectors and singular values near 1, (N, rows, columns).

    By Newton and Schulz' iteration with a quintic polynomial of these coefficients (Jordan et al. 2024).
    """
    found = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    if is_tall:  # the product with its transpose is then the smaller one
        found = found.mT
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # no singular value is above 1
    # The products of the gram matrix lose too much in half precision.
    is_wide = found.shape[-1] >= 2 * found.shape[-2] and found.dtype == torch.float32
    found = (_iterated_by_gram if is_wide else _iterated)(found, coefficients, steps)
    return (found.mT if is_tall else found).to(matrices.dtype)


def _iterated(found: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return p(p(...)) with p(X) = (a + b G + c G^2) X and G = X X^T: (N, r, c) -> (N, r, c)."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = found @ found.mT  # (N, r, c) -> (N, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, polynomial, found, beta=a)
    return found


def _iterated_by_gram(found: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return the same; only two products are with the long rows, as each next G is P G P of the P before it."""
    a, b, c = coefficients
    gram = found @ found.mT  # (N, r, c) -> (N, r, r)
    product: Tensor | None = None
    for left in reversed(range(steps)):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if left:
            gram = polynomial @ (polynomial @ gram)  # powers of one matrix: their order is free
    return found if product is None else product @ found
