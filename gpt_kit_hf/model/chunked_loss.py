"""Cross entropy of an output projection without full logits. This file is copied into saved model folders.

Shapes: B batch size, T tokens of a row, N tokens, D model width, V vocabulary size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing

# Logits computed at once on a CPU, and their bytes on other devices: enough rows for a fast matrix product, little
# memory compared to the model. Each block of a device also reads and writes the gradient of the weight.
_CPU_LOGITS, _DEVICE_BYTES = 1 << 26, 1 << 29
# Columns are padded to a multiple of this: products with unaligned rows are a third slower.
_ALIGNMENT = 64


def can_skip_logits(projection: nn.Module, hidden_states: Tensor) -> bool:
    """Return whether the logits are the product of the hidden states and one complete weight.

    They are not with an adapter or a hook, except those by which FSDP2 gathers a sharded weight. In a trace the answer
    is no: compilers fuse the plain computation themselves.
    """
    hooks = [*projection._forward_hooks.values(), *projection._forward_pre_hooks.values()]
    if _is_sharded(projection):
        # FSDP2 makes a subclass of the module's class and of its own.
        is_plain = type(projection).__mro__[2] is nn.Linear and all(map(_is_of_fsdp, hooks))
    else:
        is_plain = type(projection) is nn.Linear and type(projection.weight.data) is Tensor and not hooks
    return is_plain and not is_tracing(hidden_states)


def _is_sharded(module: nn.Module) -> bool:
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # takes long to import, and a single process needs none of it

    return isinstance(module, FSDPModule)


def _is_of_fsdp(hook: Callable[..., Any]) -> bool:
    return hook.__module__.startswith("torch.distributed.fsdp.")


def projected_loss(projection: nn.Linear, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return `causal_loss` with the weight of the projection, which FSDP2 may have sharded."""
    if not _is_sharded(projection):
        return causal_loss(hidden_states, projection.weight, *args, **kwargs)
    # FSDP2 gathers the weight when the module is called, and reduces its gradient after the backward pass of that
    # call: the loss is computed in the call, in place of the logits.
    module: Any = projection
    module.forward = lambda inputs: causal_loss(inputs, projection.weight, *args, **kwargs)
    try:
        loss: Tensor = module(hidden_states)
    finally:
        del module.forward
    return loss


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
    sums and softmax float32. On a CPU, untrained rows are skipped; in half precision, the rest is filled up to a
    `padded_size`.
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    if _on_cpu(targets):  # on other devices, reading the number of rows would wait for the device
        trained = targets != ignore_index
        if not trained.all():
            rows = trained.nonzero().flatten()
            size = min(padded_size(len(rows)), len(targets)) if dtype.itemsize == 2 else len(rows)
            missing = size - len(rows)
            targets = nn.functional.pad(targets.index_select(0, rows), (0, missing), value=ignore_index)
            # With a trained row, untrained: the others may hold anything.
            hidden_states = hidden_states.index_select(0, torch.cat([rows, rows[:1].expand(missing)]))
    if not torch.is_grad_enabled():
        return _loss_and_gradients(hidden_states, weight, targets, ignore_index, dtype, (False, False))[0]
    total: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_states, weight, targets, ignore_index, dtype
    )
    return total


def padded_size(count: int) -> int:
    """Return the least of a few sizes, eight for each power of two, that is not below `count`.

    oneDNN makes kernels for each size of a product in bfloat16, about 0.8 MB each, and keeps a thousand
    (benchmarks/README.md).
    """
    unit = 1 << max(0, count.bit_length() - 4)
    return count + -count % unit


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
    replace = _replace_by_gradients if _on_cpu(weight) else _compiled  # on a CPU, it would not be faster
    with torch.autocast(hidden_states.device.type, enabled=False):
        inputs, projection = hidden_states.to(dtype), _aligned(weight, dtype)
        for rows, logits in _blocks(inputs, projection):
            losses[rows] = replace(logits, len(weight), targets[rows], ignore_index, needed=any(wanted))
            gradients = logits[:, : len(projection)]
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
    return losses.sum(), hidden_grad, None if weight_grad is None else weight_grad[: len(weight)]


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (V, D) in `dtype`; with rows of zeros up to a multiple of the alignment, except on a CPU.

    There the copy costs more time than the aligned products of a whole block save.
    """
    missing = -len(weight) % _ALIGNMENT
    if missing == 0 or _on_cpu(weight):
        return weight.to(dtype)
    padded = weight.new_empty(len(weight) + missing, weight.shape[1], dtype=dtype)
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0.0
    return padded


def _blocks(hidden_states: Tensor, projection: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows, as slices, with their logits in aligned rows (n, V padded); all blocks share one buffer.

    Behind the columns of the projection are zeros: products of torch in bfloat16 on a CPU read one column more if
    their number is odd, and a NaN there would spoil the gradient.
    """
    count, columns = len(hidden_states), len(projection)
    padded = columns + -columns % _ALIGNMENT
    logits_at_once = _CPU_LOGITS if _on_cpu(projection) else _DEVICE_BYTES // projection.element_size()
    most = max(1, logits_at_once // padded)
    size = min(count, 1 << (most.bit_length() - 1))  # a power of two, or all rows
    buffer = hidden_states.new_empty(size, padded)
    buffer[:, columns:] = 0.0
    for first in range(0, count, max(1, size)):
        rows = slice(first, min(first + size, count))
        logits = buffer[: rows.stop - first]
        torch.mm(hidden_states[rows], projection.T, out=logits[:, :columns])
        yield rows, logits


def _replace_by_gradients(logits: Tensor, columns: int, targets: Tensor, ignore_index: int, *, needed: bool) -> Tensor:
    """Return the loss of each row (n,), in float32 or wider; replace logits by their gradients, if needed.

    `logits` are (n, V padded), the first `columns` of which count: (n, V). The gradients are softmax minus 1 at the
    target. Few passes and little memory, operation by operation.
    """
    logits = logits[:, :columns]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    trained = (targets != ignore_index)[:, None]
    column = targets.where(trained[:, 0], 0)[:, None]
    scores -= scores.amax(dim=-1, keepdim=True)
    at_target = scores.gather(1, column)
    total = scores.exp_().sum(dim=-1, keepdim=True)
    losses = torch.where(trained, total.log() - at_target, 0.0)
    if needed:
        scores *= torch.where(trained, total.reciprocal(), 0.0)
        scores.scatter_(1, column, scores.gather(1, column) - trained.to(scores.dtype))
        if scores.dtype != logits.dtype:
            logits.copy_(scores)
    return losses[:, 0]


def _replace_by_gradients_fused(
    logits: Tensor, columns: int, targets: Tensor, ignore_index: int, *, needed: bool
) -> Tensor:
    """Return and do the same as `_replace_by_gradients`, in a form that torch.compile makes one kernel of.

    It reads the logits for the sum, and again to replace them; nothing of their size is stored beside them.
    """
    scores = logits[:, :columns].to(torch.promote_types(logits.dtype, torch.float32))
    trained = (targets != ignore_index)[:, None]
    column = targets.where(trained[:, 0], 0)[:, None]
    highest = scores.amax(dim=-1, keepdim=True)
    total = (scores - highest).exp().sum(dim=-1, keepdim=True)
    # Gathered from the logits themselves: from the scores, the compiler would store all of these.
    losses = torch.where(trained, total.log() + highest - logits.gather(1, column), 0.0)
    if needed:
        # A comparison is a part of the same kernel, as a scatter is not.
        is_target = torch.arange(columns, device=logits.device) == column
        softmax = (scores - highest).exp() / total
        logits[:, :columns] = torch.where(trained, softmax - is_target.to(scores.dtype), 0.0)
    return losses[:, 0]


class _Compiled:
    """`_replace_by_gradients_fused` as one kernel, or `_replace_by_gradients` where torch cannot compile it."""

    def __init__(self) -> None:
        self.function: Callable[..., Tensor] | None = None

    def __call__(self, logits: Tensor, columns: int, targets: Tensor, ignore_index: int, *, needed: bool) -> Tensor:
        """Call the function; the first call compiles it."""
        import torch._dynamo  # takes a second, which a CPU does not need to spend

        if self.function is None:
            # As one graph: compiling fails before anything was computed, so nothing is computed twice.
            self.function = torch.compile(_replace_by_gradients_fused, fullgraph=True)
        for tensor in (logits, targets):  # one kernel for any number of rows
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return self.function(logits, columns, targets, ignore_index, needed=needed)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit):
            self.function = _replace_by_gradients
            return self.function(logits, columns, targets, ignore_index, needed=needed)


_compiled = _Compiled()
