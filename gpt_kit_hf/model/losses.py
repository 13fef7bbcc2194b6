"""Batch, loader and step losses for a hand-written loop: a sum over trained tokens and their count.

The targets of this room are already shifted: target[b, t] is the token that follows input[b, t]. They must
not be passed to a transformers model as ``labels``: it shifts those itself, and would learn to predict two
ahead.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from gpt_kit_hf.errors import NonFiniteError, UsageError


class Batch(NamedTuple):
    """Token ids and what follows each: all are (B, T) int64.

    ``targets`` is shifted already, and ``ignore_index`` where nothing is trained. ``position_ids`` restart at 0 where
    a packed document begins, and documents of a row do not see each other; None where a row is one document.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None = None


class SummedLoss(NamedTuple):
    """The loss of one batch before any division: both are scalars on the model's device.

    ``loss_sum`` is the sum of the token losses in nats, float32, with graph; ``n_trained`` is the number of
    tokens in that sum, int64.
    """

    loss_sum: Tensor
    n_trained: Tensor


class StepResult(NamedTuple):
    """What one optimizer step saw: the mean loss in nats a token, and the gradient norm before clipping."""

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

    Sums and counts of several batches or processes may be added; a mean of means may not, where the batches
    hold different numbers of trained tokens.

    Args:
        input_batch: (B, T) token ids.
        target_batch: (B, T) token ids, already shifted; ``ignore_index`` where nothing is trained.
        model: a causal language model of transformers, or a module that returns logits (B, T, V); bare or
            inside DistributedDataParallel, FSDP or torch.compile.
        device: where to compute; the model's own by default.
        ignore_index: the target that is not trained.
        position_ids: (B, T), restarting at 0 where a packed document begins; passed to the model if given.

    Raises:
        UsageError: a batch is not (B, T) integers, the shapes differ, the model returns no logits (B, T, V),
            or, where the targets are on the CPU, one of them is outside the vocabulary.

    """
    _check_batch(input_batch, target_batch)
    device = _device_of(model, input_batch) if device is None else device
    # No attention mask: rows are padded on the right, where causal attention never looks, and pads train
    # nothing.
    packing = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    if (vocab_size := _vocab_size_without_logits(model)) is not None:
        if target_batch.is_cpu:
            _check_targets(target_batch, vocab_size, ignore_index)
        targets = target_batch.to(device)
        # The number of items is what the model divides the sum by.
        asked = {"shift_labels": targets, "num_items_in_batch": 1, "ignore_index": ignore_index, "skip_logits": True}
        output = model(input_batch.to(device), use_cache=False, **packing, **asked)
        return SummedLoss(output.loss, (targets != ignore_index).sum())
    logits = _logits(model, input_batch.to(device), packing)  # (B, T) -> (B, T, V)
    if logits.shape[:-1] != target_batch.shape:
        raise UsageError(
            f"model returned logits {tuple(logits.shape)} for targets {tuple(target_batch.shape)}; "
            "they must be (batch, seq_len, vocab_size)"
        )
    if target_batch.is_cpu:  # on an accelerator the look would wait for the device at every step
        _check_targets(target_batch, logits.shape[-1], ignore_index)
    targets = target_batch.to(device)
    return SummedLoss(_summed_cross_entropy(logits, targets, ignore_index), (targets != ignore_index).sum())


def compute_batch_loss(
    input_batch: Tensor,
    target_batch: Tensor,
    model: nn.Module,
    device: torch.device | str | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean loss of the batch's trained tokens: a scalar in nats a token, float32, with graph.

    A batch without a trained token gives 0 with a graph of zero gradients, so that every process of a
    distributed run can step. Arguments and errors are those of ``summed_batch_loss``.
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

    Each token weighs the same, whatever the size of its batch. The model is evaluated without graph and left
    in the train and eval modes that it had, module by module. The CPU generator of torch is left as it was,
    though ``iter(DataLoader)`` draws from it: a loader that shuffles with it gives the same order at each
    call until the caller draws.

    Raises:
        UsageError: ``num_batches`` is below 1, the loader is empty, or no token is trained; and the errors of
            ``summed_batch_loss``.

    """
    if num_batches is not None and num_batches < 1:
        raise UsageError(f"num_batches={num_batches}: at least 1, or None for the whole loader")
    losses: list[SummedLoss] = []
    # No devices: in eval mode nothing draws on one, and the loader draws on the CPU only.
    with torch.random.fork_rng(devices=[]), evaluation_mode(model), torch.no_grad():
        for input_batch, target_batch in itertools.islice(data_loader, num_batches):
            losses.append(summed_batch_loss(input_batch, target_batch, model, device, ignore_index))
    if not losses:
        raise UsageError("data_loader gave no batch; a mean loss needs at least one")
    # Fetched at the end, so that the device is not waited for at every batch; float64, as there may be many.
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

    The norm is the Euclidean norm over all parameters of the optimizer; ``max_norm=None`` reports it and
    does not clip. The scheduler, where there is one, steps once after the optimizer. The model's train or
    eval mode is the caller's to set.

    Raises:
        UsageError: ``max_norm`` is not above 0; and the errors of ``summed_batch_loss``.
        NonFiniteError: the loss or the norm is not finite; neither weights nor optimizer have changed, and
            the gradients are cleared.

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
    """Put the model in eval mode, and give each of its modules its own mode back, also at an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training  # not train(): it would set the modules below as well


def _summed_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Return the sum of -log softmax(logits)[target] over the trained targets, computed in float32.

    (B, T, V), (B, T) -> (). For models that cannot do without the logits.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index, reduction="sum")


def _logits(model: nn.Module, input_ids: Tensor, packing: dict[str, Tensor]) -> Tensor:
    """Return the model's logits (B, T, V), whether it returns them bare or in an output object."""
    # A key-value cache serves generation; in training it would only hold memory.
    cacheless = {"use_cache": False} if _takes(model, "use_cache") else {}
    output = model(input_ids, **packing, **cacheless)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UsageError(f"model returned {type(output).__name__}; it must return logits, or an object with .logits")
    return logits


def _vocab_size_without_logits(model: nn.Module) -> int | None:
    """Return the vocabulary size of a model that computes the loss without logits, else None."""
    if not _takes(model, "skip_logits"):
        return None
    for module in model.modules():  # the model itself, or the first inside what wraps it
        if isinstance(module, PreTrainedModel) and "skip_logits" in _parameters(type(module).forward):
            return int(module.config.get_text_config().vocab_size)
    return None


@functools.cache
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


def _takes(model: nn.Module, argument: str) -> bool:
    """Return whether the model inside the wrappers takes an argument: by name, or to hand it on."""
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    # What a class's function takes may be kept; a function that is an instance's own would be kept alive.
    own = "forward" in vars(model)
    parameters = inspect.signature(model.forward).parameters if own else _parameters(type(model).forward)
    if argument in parameters:
        return True
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return hands_on and any(isinstance(module, PreTrainedModel) for module in model.modules())


def _device_of(model: nn.Module, input_batch: Tensor) -> torch.device:
    """Return the device of the model's first parameter, or the batch's where there is no parameter."""
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
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if outside.any():
        raise UsageError(
            f"target_batch holds {int(targets[outside][0])}; a target is below vocab_size={vocab_size} "
            f"or is ignore_index={ignore_index}"
        )
