"""Batch, loader and step losses for a hand-written training loop: a loss sum and the number of trained tokens.

The targets are already shifted: target[b, t] is the token after input[b, t]. Do not pass them to a transformers model
as ``labels``: it shifts labels itself and would learn to predict two tokens ahead.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gpt_kit_hf.errors import NonFiniteError, UsageError
from gpt_kit_hf.model.own_class import is_gpt_kit
from gpt_kit_hf.model.packed_documents import document_lengths


class Batch(NamedTuple):
    """Input ids and shifted targets, both (B, T) int64.

    ``targets`` is ``ignore_index`` at untrained tokens. ``position_ids`` (B, T) restart at 0 at each packed document;
    the documents of a row do not attend to each other. None if each row is one document.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None = None


class SummedLoss(NamedTuple):
    """The undivided loss of a batch; both are scalars on the model's device.

    ``loss_sum`` is the sum of the token losses in nats, float32, with graph; ``n_trained`` is the number of trained
    tokens, int64.
    """

    loss_sum: Tensor
    n_trained: Tensor


class StepResult(NamedTuple):
    """The result of one optimizer step: the mean loss in nats per token, and the gradient norm before clipping."""

    loss: float
    grad_norm: float


def summed_batch_loss(
    input_batch: Tensor,
    target_batch: Tensor,
    model: nn.Module,
    device: torch.device | str | None = None,
    ignore_index: int = -100,
    position_ids: Tensor | None = None,
) -> SummedLoss:
    """Return the sum of the batch's token losses and the number of trained tokens.

    Sums and counts of several batches or processes can be added. Means cannot be averaged if the batches hold
    different numbers of trained tokens.

    Args:
        input_batch: (B, T) token ids.
        target_batch: (B, T) shifted token ids; ``ignore_index`` at untrained tokens.
        model: a causal language model of transformers, or a module that returns logits (B, T, V); bare or wrapped in
            DistributedDataParallel, FSDP or torch.compile.
        device: where to compute; by default the model's device.
        ignore_index: the target of untrained tokens.
        position_ids: (B, T), restarting at 0 at each packed document; passed to the model if given.

    Raises:
        UsageError: a batch is not (B, T) integers, the shapes differ, the model returns no logits (B, T, V), or a
            target is outside of the vocabulary (checked for targets on the CPU only).

    """
    _check_batch(input_batch, target_batch)
    device = _device_of(model, input_batch) if device is None else device
    inputs = _on_device(input_batch, device)
    # No attention mask: rows are padded on the right, where causal attention never looks, and padding is not trained.
    packing = {} if position_ids is None else {"position_ids": _on_device(position_ids, device)}
    inner = _unwrap(model)
    if is_gpt_kit(inner) and "skip_logits" in inspect.signature(inner.forward).parameters:
        config: Any = inner.config
        _check_targets(target_batch, config.vocab_size, ignore_index)
        targets = _on_device(target_batch, device)
        # The model divides the sum by the number of items.
        asked = {"shift_labels": targets, "num_items_in_batch": 1, "ignore_index": ignore_index, "skip_logits": True}
        if position_ids is not None and inputs.device.type == "cuda":
            packing = _packing_on_device(position_ids, inputs.device)
        output = model(inputs, use_cache=False, **packing, **asked)
        return SummedLoss(output.loss, (targets != ignore_index).sum())
    # A key-value cache is of no use in training and takes memory.
    cacheless = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
    logits = _logits_of(model(inputs, **packing, **cacheless))  # (B, T) -> (B, T, V)
    if logits.shape[:-1] != target_batch.shape:
        raise UsageError(
            f"model returned logits {tuple(logits.shape)} for targets {tuple(target_batch.shape)}; "
            "they must be (batch, seq_len, vocab_size)"
        )
    _check_targets(target_batch, logits.shape[-1], ignore_index)
    targets = _on_device(target_batch, device)
    # (B, T, V), (B, T) -> (); in float32 for logits in half precision, too.
    loss_sum = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return SummedLoss(loss_sum, (targets != ignore_index).sum())


def compute_batch_loss(
    input_batch: Tensor,
    target_batch: Tensor,
    model: nn.Module,
    device: torch.device | str | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean loss of the batch's trained tokens: a scalar in nats per token, float32, with graph.

    Without a trained token the loss is 0 and its gradients are zero, so that every process of a distributed run can
    take the step. Arguments and errors are those of ``summed_batch_loss``.
    """
    loss_sum, n_trained = summed_batch_loss(input_batch, target_batch, model, device, ignore_index)
    return loss_sum / n_trained.clamp(min=1)


def compute_loader_loss(
    data_loader: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module,
    device: torch.device | str | None = None,
    num_batches: int | None = None,
    ignore_index: int = -100,
) -> float:
    """Return the mean loss in nats over all trained tokens of the first ``num_batches`` batches, or of all.

    Every token has the same weight, whatever the size of its batch. The model runs in eval mode without a graph; the
    mode of each module is restored. The state of torch's CPU generator is restored, too, although ``iter(DataLoader)``
    draws from it: a loader that shuffles with it gives the same order at each call until the caller draws.

    Raises:
        UsageError: ``num_batches`` is below 1, the loader is empty, or no token is trained; and the errors of
            ``summed_batch_loss``.

    """
    if num_batches is not None and num_batches < 1:
        raise UsageError(f"num_batches={num_batches}: at least 1, or None for the whole loader")
    losses: list[SummedLoss] = []
    # No devices: in eval mode nothing draws on an accelerator, and the loader draws on the CPU only.
    with torch.random.fork_rng(devices=[]), evaluation_mode(model), torch.no_grad():
        for input_batch, target_batch in itertools.islice(data_loader, num_batches):
            losses.append(summed_batch_loss(input_batch, target_batch, model, device, ignore_index))
    if not losses:
        raise UsageError("data_loader gave no batch; a mean loss needs at least one")
    # Read once at the end, so as not to wait for the device at every batch. fsum: there may be many batches.
    total = math.fsum(torch.stack([loss.loss_sum for loss in losses]).tolist())
    n_trained = int(torch.stack([loss.n_trained for loss in losses]).sum())
    if n_trained == 0:
        raise UsageError(f"all targets of {len(losses)} batches are ignore_index={ignore_index}; no loss to average")
    return total / n_trained


def train_step_with_gradient_clipping(
    input_batch: Tensor,
    target_batch: Tensor,
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device | str | None = None,
    max_norm: float | None = 1.0,
    ignore_index: int = -100,
    scheduler: LRScheduler | None = None,
) -> StepResult:
    """Take one optimizer step on the batch's mean loss, with the gradient norm clipped to ``max_norm``.

    The norm is the Euclidean norm over all parameters of the optimizer; with ``max_norm=None`` it is reported and not
    clipped. The scheduler, if given, steps once after the optimizer. The caller sets the model's train or eval mode.

    Raises:
        UsageError: ``max_norm`` is not above 0; and the errors of ``summed_batch_loss``.
        NonFiniteError: the loss or the norm is not finite; weights and optimizer are unchanged, and the gradients are
            cleared.

    """
    if max_norm is not None and not max_norm > 0:
        raise UsageError(f"max_norm={max_norm}: above 0, or None for no clipping")
    optimizer.zero_grad(set_to_none=True)
    loss_tensor = compute_batch_loss(input_batch, target_batch, model, device, ignore_index)
    loss_tensor.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = math.inf if max_norm is None else max_norm
    grad_norm = nn.utils.clip_grad_norm_(parameters, limit).item()
    loss = loss_tensor.item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"loss={loss}, grad_norm={grad_norm}: not finite, so the optimizer did not step")
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return StepResult(loss, grad_norm)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and restore the mode of each of its modules, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training  # not train(), which also sets the modules below


def _packing_on_device(position_ids: Tensor, device: torch.device) -> dict[str, Any]:
    """Return a GPT-Kit model's arguments for packed rows (B, T), found where reading does not wait for the device."""
    if position_ids.device.type != "cpu":
        return {"position_ids": position_ids}
    lengths = document_lengths(position_ids, None, 0)
    if not lengths:
        return {}  # each row is one document, and its positions are those that the model counts
    bounds = lengths["cu_seq_lens_q"].to(device)  # (N + 1,)
    torch._dynamo.maybe_mark_dynamic(bounds, 0)  # blocks are compiled once for any number of documents
    # An upper bound for all batches, for the same reason.
    longest = position_ids.shape[1]
    return {
        "position_ids": position_ids.to(device),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of distributed wrappers, torch.compile and PEFT, which pass keyword arguments on."""
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    # PEFT's method: an isinstance check would need the optional package.
    unwrapped: nn.Module = cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model
    return unwrapped


def _logits_of(output: object) -> Tensor:
    """Return the logits of a model's output, which is the logits or an object with ``.logits``."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UsageError(f"model returned {type(output).__name__}; it must return logits, or an object with .logits")
    return logits


def _on_device(batch: Tensor, device: torch.device | str) -> Tensor:
    """Return the batch on a device; the copy of pinned memory is queued, so that the processor goes on at once."""
    return batch.to(device, non_blocking=batch.is_pinned())


def _device_of(model: nn.Module, input_batch: Tensor) -> torch.device:
    """Return the device of the model's first parameter, or of the batch if the model has no parameters."""
    parameter = next(model.parameters(), None)
    return input_batch.device if parameter is None else parameter.device


def _check_batch(input_batch: Tensor, target_batch: Tensor) -> None:
    for name, batch in (("input_batch", input_batch), ("target_batch", target_batch)):
        if not isinstance(batch, Tensor):
            raise UsageError(f"{name} is {type(batch).__name__}; it must be a tensor of token ids")
        if batch.is_floating_point() or batch.dtype == torch.bool or batch.ndim != 2:
            raise UsageError(f"{name} is {batch.dtype} {tuple(batch.shape)}; it must be integers (batch, seq_len)")
    if input_batch.shape != target_batch.shape:
        raise UsageError(
            f"input_batch {tuple(input_batch.shape)} and target_batch {tuple(target_batch.shape)}: "
            "shapes must be equal, as target[b, t] follows input[b, t]"
        )


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    if not targets.is_cpu:  # reading the targets would wait for the accelerator at every step
        return
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if outside.any():
        raise UsageError(
            f"target_batch holds {int(targets[outside][0])}; a target must be below vocab_size={vocab_size} "
            f"or be ignore_index={ignore_index}"
        )
