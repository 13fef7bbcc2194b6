"""The one trainer: an update of the weights in fp32, bf16 or fp16, on Accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import parse_choice_from_env
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.model.losses import Batch, summed_batch_loss
from gpt_kit_hf.training.state.sharded_state import is_dtensor

Precision = Literal["fp32", "bf16", "fp16"]
# "no" is Accelerate's word for fp32.
_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What an update did.

    `loss` is the mean over the trained tokens of the whole batch, in nats; `grad_norm` the gradients' norm before
    clipping; `loss_scale` fp16's factor during the update. `skipped` is None, or why the weights did not move.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    skipped: str | None
    loss_scale: float | None


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision that `name` means on a device.

    "auto" is what `accelerate launch --mixed_precision` said, else bf16 where the device computes in it, else fp32.
    Raises UsageError for an unknown name and for a precision that the device lacks.
    """
    if name == "auto":
        launched = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
        if launched == "no":
            return "bf16" if _computes_in_bf16(device) else "fp32"
        name = launched
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
        # Without these instructions bf16 runs on a CPU too, but slower than fp32. Older versions of torch do not tell.
        abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
    return False


class AMPTrainer:
    """Updates a model's weights in mixed precision, by one batch at a time, on any number of processes.

    The weights stay in their own precision; the forward pass runs in `mixed_precision` ("auto", "fp32", "bf16",
    "fp16"), fp16 with loss scaling (Micikevicius et al. 2018), on a CPU as well as on a GPU. An update whose loss or
    gradient is not finite leaves weights and optimizer as they are and says so; fp16 then halves its scale.

    `accelerator` is made if not given; it places the model and joins the processes. `self.model` is the prepared
    model, `accelerator.unwrap_model(trainer.model)` the one that was passed.
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
        # Autocast and scaling are torch's own here: Accelerate has no fp16 on a CPU, and would copy all logits to
        # fp32 after each forward pass.
        self.accelerator = Accelerator(mixed_precision="no") if accelerator is None else accelerator
        device = self.accelerator.device
        self.precision = resolve_precision(mixed_precision, device)
        self.max_grad_norm = max_grad_norm
        self.ignore_index = ignore_index
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which a forward pass runs in the trainer's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, _DTYPES[self.precision])

    def train_step(self, input_batch: Tensor, target_batch: Tensor) -> UpdateReport:
        """Update the weights by one batch: (B, T) token ids and their targets, shifted by one."""
        return self.update([Batch(input_batch, target_batch)])

    def update(
        self,
        micro_batches: Sequence[Batch | tuple[Tensor, Tensor]],
        *,
        before_micro_batch: Callable[[int], None] | None = None,
        spike_limit: float = math.inf,
    ) -> UpdateReport:
        """Update the weights by a batch that comes in parts; each process passes its own parts, equally many.

        The loss is the sum over all parts and processes divided by the number of trained tokens in all of them, so
        that the cut into parts changes nothing. `before_micro_batch(i)` is called before part i is computed. An
        update whose gradient norm is above `spike_limit` is skipped.
        """
        self.model.train()
        batches = [Batch(*parts) for parts in micro_batches]
        tokens = self._trained_tokens(batches)
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches):
            if before_micro_batch is not None:
                before_micro_batch(index)
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    loss_sum = summed_batch_loss(
                        batch.input_ids,
                        batch.targets,
                        self.model,
                        self.accelerator.device,
                        self.ignore_index,
                        batch.position_ids,
                    ).loss_sum
                # Processes average their gradients: times their number is the sum that the division wants.
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
        """Clip and step, unless something is not finite or too large."""
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if is_dtensor(norm) else norm
        # Read together: the one time in a step that a device is waited for.
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
        # The scaler has seen the gradients in unscale_: it halves the scale if one of them was not finite.
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateReport(loss=loss, grad_norm=grad_norm, trained_tokens=tokens, skipped=skipped, loss_scale=scale)
