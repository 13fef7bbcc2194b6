"""Cross entropy of an output projection without full logits. This file is copied into saved model folders.

Shapes: B batch size, T tokens of a row, N tokens, D model width, V vocabulary size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing

# Logits computed at once: enough rows for a fast matrix product, little memory compared to the model.
_CPU_LOGITS, _DEVICE_LOGITS = 1 << 26, 1 << 27
# Columns are padded to a multiple of this: products with unaligned rows are a third slower.
_ALIGNMENT = 64


def can_skip_logits(projection: nn.Module, hidden_states: Tensor) -> bool:
    """Return whether the logits are the product of the hidden states and one complete weight.

    They are not with an adapter, a hook or a sharded weight. In a trace the answer is no: compilers fuse the plain
    computation themselves.
    """
    has_hooks = projection._forward_hooks or projection._forward_pre_hooks
    is_plain = type(projection) is nn.Linear and type(projection.weight.data) is Tensor and not has_hooks
    return is_plain and not is_tracing(hidden_states)


def causal_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **_: Unpack[TransformersKwargs],
) -> Tensor:
    """Return the same loss as transformers' causal LM loss, without its logits: (B, T, D), (V, D) -> ().

    `labels` (B, T) are shifted here, `shift_labels` (B, T) are already shifted. The loss is the mean over the trained
    targets, or their sum divided by `num_items_in_batch`.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden_states.device)  # (B, T) -> (B * T,)
    total = summed_cross_entropy(hidden_states.flatten(0, -2), weight, targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def summed_cross_entropy(hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the sum of -log softmax(hidden_states @ weight.T)[target] over the targets that are not `ignore_index`.

    (N, D), (V, D), (N,) -> (), in float32 or wider. The logits are computed in blocks of rows, and the gradients
    together with the loss; the backward pass only scales them, so it can run once. Products use autocast's dtype,
    sums and softmax float32. On a CPU, untrained rows are skipped.
    """
    if targets.device.type == "cpu":  # on other devices, reading the number of rows would wait for the device
        trained = targets != ignore_index
        if not trained.all():
            rows = trained.nonzero().flatten()
            hidden_states, targets = hidden_states.index_select(0, rows), targets.index_select(0, rows)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    if not torch.is_grad_enabled():
        return _loss_and_gradients(hidden_states, weight, targets, ignore_index, dtype, (False, False))[0]
    total: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_states, weight, targets, ignore_index, dtype
    )
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype
    ) -> Tensor:
        total, *gradients = _loss_and_gradients(
            hidden_states, weight, targets, ignore_index, dtype, ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place: autograd notices the change and refuses a second backward pass.
        if hidden_grad is not None:
            hidden_grad.mul_(scale)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None


def _loss_and_gradients(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the summed loss and, if wanted, its gradients with respect to the hidden states and the weight."""
    exact = torch.promote_types(dtype, torch.float32)
    losses = torch.zeros(len(targets), dtype=exact, device=targets.device)
    hidden_grad = torch.empty_like(hidden_states) if wanted[0] else None
    weight_grad = None
    with torch.autocast(hidden_states.device.type, enabled=False):
        inputs, projection = hidden_states.to(dtype), weight.to(dtype)
        for rows, scores in _blocks(inputs, projection, exact):
            losses[rows] = _replace_by_gradients(scores, targets[rows], ignore_index, needed=any(wanted))
            gradients = scores.to(dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = gradients @ projection  # (n, V) @ (V, D) -> (n, D)
            if wanted[1] and weight_grad is None:
                weight_grad = (gradients.T @ inputs[rows]).to(exact)  # (V, n) @ (n, D) -> (V, D)
            elif weight_grad is not None and dtype == exact:
                weight_grad.addmm_(gradients.T, inputs[rows])
            elif weight_grad is not None:
                weight_grad += gradients.T @ inputs[rows]
        if wanted[1] and weight_grad is None:  # no row is trained
            weight_grad = torch.zeros_like(weight, dtype=exact)
    return losses.sum(), hidden_grad, weight_grad


def _blocks(hidden_states: Tensor, weight: Tensor, exact: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows, as slices, with their logits (n, V) in `exact`; all blocks share one buffer."""
    count, columns = len(hidden_states), len(weight)
    padded = -(-columns // _ALIGNMENT) * _ALIGNMENT
    most = max(1, (_CPU_LOGITS if weight.device.type == "cpu" else _DEVICE_LOGITS) // padded)
    size = min(count, 1 << (most.bit_length() - 1))  # a power of two, or all rows
    buffer = hidden_states.new_empty(size, padded)
    for first in range(0, count, max(1, size)):
        rows = slice(first, min(first + size, count))
        scores = buffer[: rows.stop - first, :columns]
        torch.mm(hidden_states[rows], weight.T, out=scores)
        yield rows, scores.to(exact)


def _replace_by_gradients(scores: Tensor, targets: Tensor, ignore_index: int, *, needed: bool) -> Tensor:
    """Return the loss of each row (n,); replace logits (n, V) by their gradients: softmax minus 1 at the target."""
    trained = (targets != ignore_index)[:, None]
    column = targets.where(trained[:, 0], 0)[:, None]
    scores -= scores.amax(dim=-1, keepdim=True)
    at_target = scores.gather(1, column)
    total = scores.exp_().sum(dim=-1, keepdim=True)
    losses = torch.where(trained, total.log() - at_target, 0.0)
    if needed:
        scores *= torch.where(trained, total.reciprocal(), 0.0)
        scores.scatter_add_(1, column, -trained.to(scores.dtype))
    return losses[:, 0]
