"""AMPTrainer: one update of the weights in fp32, bf16 or fp16, on Accelerate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.model.losses import Batch, summed_batch_loss
from gpt_kit_hf.training.state.sharded_state import is_dtensor

Precision = Literal["fp32", "bf16", "fp16"]
# Accelerate calls fp32 "no".
_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What an update did.

    `loss` is the mean over the trained tokens of the global batch, in nats; `grad_norm` the norm of the gradients
    before clipping; `loss_scale` the factor that fp16 used. `skipped` is None, or why the weights are unchanged.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    skipped: str | None
    loss_scale: float | None


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision for an option's value on a device.

    "auto" is the value of `accelerate launch --mixed_precision`, else bf16 if the device computes in it, else fp32.
    Raises UsageError for an unknown name and for a precision that the device lacks.
    """
    if name == "auto":
        # How `accelerate launch` passes its option to the processes; transformers' TrainingArguments reads it, too.
        name = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if name == "no":
            return "bf16" if _computes_in_bf16(device) else "fp32"
    if name not in _PRECISIONS:
        raise UsageError(unknown_name("mixed_precision", name, ["auto", "fp32", "bf16", "fp16"]))
    precision = _PRECISIONS[name]
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError("mixed_precision=bf16: this GPU has no bf16; use fp16 or fp32")
    if precision != "fp32" and device.type not in ("cpu", "cuda", "xpu"):
        raise UsageError(f"mixed_precision={name}: not available on {device.type!r}; use fp32")
    return precision


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Without these instructions bf16 is slower than fp32 on a CPU. Older versions of torch do not report them.
        abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
    return False


class AMPTrainer:
    """Updates a model's weights in mixed precision, one batch at a time, on any number of processes.

    The weights stay in their own precision; the forward pass runs in `mixed_precision` ("auto", "fp32", "bf16",
    "fp16"), fp16 with loss scaling (Micikevicius et al. 2018), on CPUs as well as on GPUs. An update whose loss or
    gradient norm is not finite is skipped: weights and optimizer stay as they are, and fp16 halves its scale.

    `accelerator` places the model and connects the processes; create it with mixed_precision="no", as the
    default one is. `self.model` is the prepared model, `accelerator.unwrap_model(trainer.model)` the original.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        mixed_precision: str = "auto",
        max_grad_norm: float | None = 1.0,
        ignore_index: int = -100,
        accelerator: Accelerator | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise UsageError(f"max_grad_norm must be above 0, or None for no clipping, got {max_grad_norm}")
        # Precision is this class's, by torch.autocast and GradScaler, and not Accelerate's, which has no fp16 on a
        # CPU, copies all logits to fp32 after each forward pass, and reduces FSDP2's gradients in bf16.
        self.accelerator = Accelerator(mixed_precision="no") if accelerator is None else accelerator
        device = self.accelerator.device
        self.precision = resolve_precision(mixed_precision, device)
        self.max_grad_norm = max_grad_norm
        self.ignore_index = ignore_index
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context manager that runs forward passes in the trainer's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, _DTYPES[self.precision])

    def train_step(self, input_batch: Tensor, target_batch: Tensor) -> UpdateReport:
        """Update the weights with one batch: (B, T) token ids and targets, which are shifted by one already."""
        return self.update([Batch(input_batch, target_batch)])

    def update(
        self,
        micro_batches: Sequence[Batch | tuple[Tensor, Tensor]],
        *,
        before_micro_batch: Callable[[int], None] | None = None,
        spike_limit: float = math.inf,
    ) -> UpdateReport:
        """Update the weights with a batch given in micro-batches; every process passes as many, its own.

        The loss is the sum over all micro-batches and processes, divided by the number of trained tokens in all of
        them: it does not depend on how the batch is split. `before_micro_batch(i)` is called before micro-batch i is
        computed. An update whose gradient norm is above `spike_limit` is skipped.
        """
        self.model.train()
        batches = [Batch(*columns) for columns in micro_batches]
        tokens = self._trained_tokens(batches)
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            if before_micro_batch is not None:
                before_micro_batch(index)
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    loss_sum = summed_batch_loss(
                        batch.input_ids, batch.targets, self.model, device, self.ignore_index, batch.position_ids
                    ).loss_sum
                # DDP and FSDP average gradients over processes; times their number that is the sum.
                share = loss_sum * (self.accelerator.num_processes / max(tokens, 1))
                self.scaler.scale(share).backward()
            total += loss_sum.detach()
        return self._step(self.accelerator.reduce(total, reduction="sum"), tokens, spike_limit)

    def _trained_tokens(self, batches: Sequence[Batch]) -> int:
        own = sum(int((batch.targets != self.ignore_index).sum()) for batch in batches)
        if self.accelerator.num_processes == 1:
            return own
        return int(self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), reduction="sum"))

    def _step(self, total: Tensor, tokens: int, spike_limit: float) -> UpdateReport:
        """Clip the gradients and step, unless a value is not finite or a spike."""
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if is_dtensor(norm) else norm
        # Read together, so that the device is waited for once a step.
        loss_sum, grad_norm = torch.stack((total, norm.to(total))).tolist()
        loss = loss_sum / max(tokens, 1)
        skipped = None
        if tokens == 0:
            skipped = "no trained token"
        elif not math.isfinite(loss):
            skipped = f"loss is {loss}"
        elif not math.isfinite(grad_norm):
            skipped = f"gradient norm is {grad_norm}"
        elif grad_norm > spike_limit:
            skipped = f"gradient norm {grad_norm:.4g} is a spike: above {spike_limit:.4g}"
        if skipped is None:
            self.scaler.step(self.optimizer)
        # unscale_ has looked at the gradients: the scaler halves its scale if one of them was not finite.
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(loss=loss, grad_norm=grad_norm, trained_tokens=tokens, skipped=skipped, loss_scale=scale)
