"""Muon and AdamW in one optimizer; matrices of one shape are orthogonalised as one batch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.adamw import adamw

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.training.optim.owners import computed_by_owners, computed_by_replicas
from gpt_kit_hf.training.state.sharded_state import is_dtensor, local_part, one_a_row

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Elements of a batch of matrices: enough to keep a device busy, and little memory compared with the model's.
_MAX_BATCH_ELEMENTS = 1 << 24
_COPIES = 4  # of a batch of matrices, which orthogonalising it takes
# Key of a group: the decay rate of the mean squares of the rows, by which they are scaled; not at all if missing.
ROW_BETA2 = "row_beta2"
_ROW_MEANS = "row_mean_square"
_LEAST_SQUARE = 1e-20  # of a row that has no gradient


class MuonWithAdamW(Optimizer):
    """One optimizer with two update rules: Muon for the groups that have a `momentum`, AdamW for all others.

    Takes over the parameter groups of the two optimizers that it is built from; Muon's come first. A group added
    later without a `momentum` gets AdamW's defaults. Muon (Jordan et al. 2024) has torch's options, state and update,
    but orthogonalises all matrices of one shape together, in bfloat16 on an accelerator and in float32 on a CPU, as
    most CPUs compute bfloat16 many times slower.

    Processes divide the matrices among them: those that hold the same ones, by DDP, if `replicas` is their process
    group; and those that hold FSDP2's shards of rows, whose momentum is sharded in the same way. Results are the same
    for any number of processes, up to rounding. `step` raises UsageError, with nothing changed, for other shards.
    """

    replicas: ProcessGroup | None = None  # of the class, as a copied or unpickled optimizer is not initialised

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        # Both optimizers have completed their groups, so no defaults apply to these.
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.defaults = adamw.defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon_groups = [group for group in self.param_groups if "momentum" in group]
        # Checked at each step: Accelerate replaces parameters by their shards when it prepares a model for FSDP.
        check_matrices(parameter for group in muon_groups for parameter in group["params"])
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                update = self._muon_update if "momentum" in group else self._adamw_update
                update(group, parameters)
        return loss

    def update_bytes(self) -> int:
        """Return about how many bytes `step` takes while it runs, beside gradients and state, on a device."""
        total = 0
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if "momentum" in group and matrix.requires_grad]
            batches = [sum(local_part(matrices[index]).nbytes for index in batch) for batch in self._batches(matrices)]
            total += sum(batches) + _COPIES * max(batches, default=0)
        return total

    def _muon_update(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(gradient)
        gradients = [local_part(gradient) for gradient in gradients]
        means = [local_part(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        here = [local_part(matrix) for matrix in matrices]
        rate, momentum = float(group["lr"]), group["momentum"]
        torch._foreach_lerp_(means, gradients, 1.0 - momentum)
        updates = list(torch._foreach_lerp(gradients, means, momentum)) if group["nesterov"] else means
        torch._foreach_mul_(here, 1.0 - rate * group["weight_decay"])
        for indices in self._batches(matrices):
            first = matrices[indices[0]]
            stacked = torch.stack([updates[index] for index in indices])  # (N, rows here, columns)
            steps = self._orthogonalised(stacked, first, group)
            if group.get(ROW_BETA2) is not None:
                steps = self._rows_scaled(steps, [matrices[index] for index in indices], group[ROW_BETA2])
            rows, columns = first.shape
            # How the step's size depends on the shape, by torch's names.
            scales = {
                "original": math.sqrt(max(1, rows / columns)),
                "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
            }
            scale = scales[group["adjust_lr_fn"] or "original"]
            torch._foreach_add_([here[index] for index in indices], list(steps.unbind()), alpha=-rate * scale)

    def _orthogonalised(self, stacked: Tensor, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the rows here of orthogonalised matrices of `matrix`'s shape: (N, rows here, columns) -> the same."""

        def compute(matrices: Tensor) -> Tensor:
            return orthogonalised(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])

        processes = self._processes(matrix)
        if processes is None:
            return compute(stacked)
        sent = stacked.to(_compute_dtype(stacked.device))  # no more than what is computed with
        if is_dtensor(matrix):
            return computed_by_owners(sent, matrix.shape[0], processes, compute).to(stacked.dtype)
        return computed_by_replicas(sent, processes, compute).to(stacked.dtype)

    def _rows_scaled(self, steps: Tensor, matrices: list[Tensor], beta2: float) -> Tensor:
        """Return steps with equally large rows, over time: (N, rows here, columns) -> the same.

        A row is divided by the root of the running mean of its squares (NorMuon, Li et al. 2025), which starts with
        its first value. The root mean square of all is then that of an orthogonal matrix.
        """
        for matrix in matrices:
            if _ROW_MEANS not in self.state[matrix]:
                self.state[matrix][_ROW_MEANS] = torch.zeros_like(one_a_row(matrix))
        kept = [local_part(self.state[matrix][_ROW_MEANS]) for matrix in matrices]
        before = torch.stack(kept)
        squares = steps.square().mean(2, keepdim=True)  # (N, rows here, columns) -> (N, rows here, 1)
        means = torch.where(before > 0, before.lerp(squares, 1.0 - beta2), squares)
        torch._foreach_copy_(kept, list(means.unbind()))
        longer = max(matrices[0].shape)
        return steps * (means * longer).clamp(min=_LEAST_SQUARE).rsqrt()

    def _processes(self, matrix: Any) -> ProcessGroup | None:
        """Return the processes that divide the work on a matrix among them, or None."""
        if not is_dtensor(matrix):
            return self.replicas
        # With hybrid sharding each group of replicas computes all, from the same gradients.
        group: ProcessGroup = matrix.device_mesh.get_group(_dimension_of_rows(matrix))
        return group

    def _batches(self, matrices: list[Tensor]) -> Iterator[list[int]]:
        """Yield the indices of matrices of one shape, dtype and device, in batches of bounded size a process."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            alike[matrix.shape, matrix.dtype, matrix.device].append(index)
        for indices in alike.values():
            first = matrices[indices[0]]
            processes = self._processes(first)
            most = max(1, _MAX_BATCH_ELEMENTS // first.numel()) * (1 if processes is None else processes.size())
            yield from (indices[start : start + most] for start in range(0, len(indices), most))

    def _adamw_update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        on_device = group["fused"] or group["capturable"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
                state.update({key: torch.zeros_like(parameter) for key in keys})
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{key: group[key] for key in _ADAMW_ARGUMENTS},
        )


_ADAMW_ARGUMENTS = (
    "foreach", "capturable", "differentiable", "fused", "amsgrad", "lr", "weight_decay", "eps", "maximize"
)  # fmt: skip


def check_matrices(matrices: Iterable[Any]) -> None:
    """Raise UsageError if one of Muon's parameters is neither a whole matrix nor sharded by rows, as by FSDP2."""
    for matrix in matrices:
        if matrix.dim() != 2 or (is_dtensor(matrix) and _dimension_of_rows(matrix) is None):
            raise UsageError(
                f"optimizer=muon needs whole matrices, or FSDP2's shards of their rows; one of shape "
                f"{tuple(matrix.shape)} is sharded otherwise: use optimizer=adamw"
            )


def _dimension_of_rows(matrix: Any) -> int | None:
    """Return the dimension of the mesh over which a DTensor is sharded by rows, None if it is sharded otherwise."""
    found = [dimension for dimension, placement in enumerate(matrix.placements) if not placement.is_replicate()]
    return found[0] if len(found) == 1 and matrix.placements[found[0]].is_shard(0) else None


def _compute_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return the matrices with all singular values moved close to 1: (N, rows, columns) -> (N, rows, columns).

    Newton-Schulz iteration with a quintic polynomial of these coefficients (Jordan et al. 2024).
    """
    found = matrices.to(_compute_dtype(matrices.device))
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    if is_tall:  # X X^T is then the smaller product
        found = found.mT
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # singular values at most 1
    # Products of Gram matrices lose too much in half precision.
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
    """Return the same with only two products over the long rows: the next G is P G P, with P of the step before."""
    a, b, c = coefficients
    gram = found @ found.mT  # (N, r, c) -> (N, r, r)
    product: Tensor | None = None
    for left in reversed(range(steps)):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if left:
            gram = polynomial @ (polynomial @ gram)  # polynomials of one matrix commute
    return found if product is None else product @ found
