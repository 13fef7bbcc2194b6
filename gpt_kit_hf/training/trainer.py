"""AMPTrainer: one update of the weights in fp32, bf16 or fp16, on Accelerate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.model.losses import Batch, summed_batch_loss
from gpt_kit_hf.training.optim.muon import MuonWithAdamW
from gpt_kit_hf.training.runtime.launch import check_backend, create_accelerator
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
    `sums` are the numbers of `meanwhile`, summed over the processes.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    skipped: str | None
    loss_scale: float | None
    sums: tuple[int, ...] = ()


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

    `accelerator` places the model and connects the processes, by DDP or FSDP2; create it with mixed_precision="no",
    as the default one is. `self.model` is the prepared model, `accelerator.unwrap_model(trainer.model)` the original.
    With FSDP2 and bf16, processes exchange weights in bf16 and gradients in fp32.
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
        self.accelerator = create_accelerator() if accelerator is None else accelerator
        check_backend(self.accelerator)
        device = self.accelerator.device
        self.precision = resolve_precision(mixed_precision, device)
        self.max_grad_norm = max_grad_norm
        self.ignore_index = ignore_index
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        if self.accelerator.is_fsdp2 and self.precision == "bf16":
            from torch.distributed.fsdp import MixedPrecisionPolicy  # slow to import

            # Accelerate's own policy for bf16 would reduce the gradients in bf16, too.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if isinstance(self.model, DistributedDataParallel):
            # A model's buffers are constants, as the frequencies of rotary positions: nothing to send at each step.
            self.model.broadcast_buffers = False
            if isinstance(optimizer, MuonWithAdamW):
                optimizer.replicas = dist.group.WORLD

    @property
    def _is_shared(self) -> bool:
        return bool(self.accelerator.num_processes > 1)

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
        trained_tokens: int | None = None,
        before_micro_batch: Callable[[int], None] | None = None,
        meanwhile: Callable[[], Sequence[int]] | None = None,
        spike_limit: float = math.inf,
    ) -> UpdateReport:
        """Update the weights with a batch given in micro-batches; every process passes as many, its own.

        The loss is the sum over all micro-batches and processes, divided by the number of trained tokens in all of
        them: it does not depend on how the batch is split. Pass that number as `trained_tokens` if it is known, else
        the processes exchange it. `before_micro_batch(i)` is called before micro-batch i is computed, and `meanwhile`
        while a GPU computes the backward pass; the numbers that it returns, below 2**32, are summed over the
        processes. An update whose gradient norm is above `spike_limit` is skipped.
        """
        self.model.train()
        batches = [Batch(*columns) for columns in micro_batches]
        if trained_tokens is None:
            own = self.count_trained_tokens(batches)
            trained_tokens = int(self._summed(torch.tensor(float(own)), [])[0]) if self._is_shared else own
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches):
            if before_micro_batch is not None:
                before_micro_batch(index)
            # FSDP2 reduces the gradients of each micro-batch: otherwise each process would hold all of them in fp32.
            reduces = index == len(batches) - 1 or self.accelerator.is_fsdp2
            with nullcontext() if reduces else self.accelerator.no_sync(self.model):
                total += self._backward(batch, trained_tokens)
        numbers = () if meanwhile is None else meanwhile()
        return self._step(self._summed(total, numbers), numbers, trained_tokens, spike_limit)

    def count_trained_tokens(self, batches: Sequence[Batch]) -> int:
        """Return the number of trained tokens in batches, of this process."""
        return sum(int((batch.targets != self.ignore_index).sum()) for batch in batches)

    def _backward(self, batch: Batch, trained_tokens: int) -> Tensor:
        """Add the gradients of this process's part of the loss; return its loss sum, ()."""
        with self.autocast():
            loss_sum = summed_batch_loss(
                batch.input_ids,
                batch.targets,
                self.model,
                self.accelerator.device,
                self.ignore_index,
                batch.position_ids,
            ).loss_sum
        # DDP and FSDP average gradients over processes; times their number that is the sum.
        share = loss_sum * (self.accelerator.num_processes / max(trained_tokens, 1))
        self.scaler.scale(share).backward()
        return loss_sum.detach()

    def _summed(self, total: Tensor, numbers: Sequence[int]) -> Tensor:
        """Return total and numbers, summed over the processes in one collective: (1 + N,); alone, total only: (1,)."""
        if not self._is_shared:
            return total[None]
        device = self.accelerator.device
        on_gpu = device.type == "cuda"  # which is not waited for
        values = torch.tensor([0, *numbers], dtype=torch.float64, pin_memory=on_gpu)  # exact up to 2**53
        values = values.to(device, non_blocking=on_gpu)
        values[0] = total
        summed: Tensor = self.accelerator.reduce(values, reduction="sum")
        return summed

    def _step(self, total: Tensor, numbers: Sequence[int], tokens: int, spike_limit: float) -> UpdateReport:
        """Clip the gradients and step, unless a value is not finite or a spike; `total` is that of `_summed`."""
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if is_dtensor(norm) else norm
        # Read together, so that the device is waited for once a step.
        loss_sum, *sums, grad_norm = torch.cat((total, norm.to(total)[None])).tolist()
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
        # DDP's gradients stay in the buffers that it communicates: new ones would be a second copy of them.
        in_buffers = isinstance(self.model, DistributedDataParallel) and self.model.gradient_as_bucket_view
        self.optimizer.zero_grad(set_to_none=not in_buffers)
        return UpdateReport(
            loss=loss,
            grad_norm=grad_norm,
            trained_tokens=tokens,
            skipped=skipped,
            loss_scale=scale,
            sums=tuple(map(int, sums if self._is_shared else numbers)),
        )
