"""The optimizer and the learning rate of each step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from gpt_kit_hf.errors import UsageError


def _option(default: float, help_text: str) -> float:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How the weights follow the gradient."""

    learning_rate: float = _option(1e-3, "highest learning rate")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = dataclasses.field(
        default="cosine",
        metadata={"help": "learning rate after the warm-up; wsd is warmup-stable-decay, linear in the decay"},
    )
    warmup_steps: int = dataclasses.field(default=100, metadata={"help": "steps over which the learning rate rises"})
    min_lr_ratio: float = _option(0.1, "learning rate at the end, as a share of the highest")
    decay_ratio: float = _option(0.2, "share of the steps in which wsd decays")
    weight_decay: float = _option(0.1, "decoupled weight decay of matrices; biases and norms have none")
    beta1: float = _option(0.9, "decay of AdamW's mean of gradients")
    beta2: float = _option(0.99, "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = _option(1e-8, "AdamW's guard against division by zero")
    grad_clip: float = _option(1.0, "greatest norm of the gradient; 0 for no clipping")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "adam_epsilon"):
            self._require(name, 0.0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("weight_decay", "grad_clip"):
            self._require(name, 0.0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("beta1", "beta2"):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "at least 0 and below 1")
        for name in ("min_lr_ratio", "decay_ratio"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "between 0 and 1")
        self._require("warmup_steps", self.warmup_steps >= 0, "at least 0")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {rule}, got {getattr(self, name)}")


def create_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019) in two groups: matrices decay, biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def learning_rate_at(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """Return the learning rate of step 0, 1, ... of `total_steps`.

    It rises linearly over `warmup_steps`, then: cosine falls along half a cosine (Loshchilov and Hutter 2017),
    linear along a line, to `min_lr_ratio` of the peak; wsd stays, and falls along a line in the last `decay_ratio`
    of the steps (Hu et al. 2024); constant stays.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    low = options.min_lr_ratio
    start = options.warmup_steps
    if options.schedule == "wsd":
        start = max(start, total_steps - round(total_steps * options.decay_ratio))
    # The last step, total_steps - 1, has the lowest rate.
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
    if options.schedule == "constant":
        factor = 1.0
    elif options.schedule == "cosine":
        factor = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = 1.0 - (1.0 - low) * progress
    return options.learning_rate * factor


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give all groups the learning rate of a step.

    The rate is a function of the step, so there is no scheduler whose state could be lost or step too often.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
