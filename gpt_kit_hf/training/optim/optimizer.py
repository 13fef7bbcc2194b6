"""Creates the optimizer of a model, and computes the learning rate of each step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.training.optim.muon import MuonWithAdamW, require_whole

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "linear", "constant"]

# Key of a parameter group: its learning rate divided by that of the step; 1 if missing.
_RATE_RATIO = "rate_ratio"


def _option(default: float, help_text: str) -> float:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How the weights follow the gradient."""

    optimizer: OptimizerName = dataclasses.field(
        default="adamw",
        metadata={"help": "adamw, or muon for the matrices of the blocks beside adamw for the rest"},
    )
    learning_rate: float = _option(1e-3, "highest learning rate")
    schedule: Schedule = dataclasses.field(
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
    muon_momentum: float = _option(0.95, "decay of Muon's mean of gradients")
    muon_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "highest learning rate of the matrices, if not learning_rate"}
    )

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OptimizerName), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(known):
                raise UsageError(unknown_name(name, getattr(self, name), get_args(known)))
        for name in ("learning_rate", "adam_epsilon"):
            self._require(name, 0.0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("weight_decay", "grad_clip"):
            self._require(name, 0.0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("beta1", "beta2", "muon_momentum"):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "at least 0 and below 1")
        for name in ("min_lr_ratio", "decay_ratio"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "between 0 and 1")
        self._require("warmup_steps", self.warmup_steps >= 0, "at least 0")
        if self.muon_learning_rate is not None:
            self._require("muon_learning_rate", 0.0 < self.muon_learning_rate < math.inf, "positive and finite")
        for name in ("muon_momentum", "muon_learning_rate"):
            if self.optimizer != "muon" and getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"{name}={getattr(self, name)} is for optimizer=muon, not {self.optimizer}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {rule}, got {getattr(self, name)}")


# What an optimizer's options are where a user says no more than the name.
_RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    # Found on tinyshakespeare, 4 layers of 256 (benchmarks/README.md): a stable phase gains nothing in so short a run.
    "fast": {
        "optimizer": "muon",
        "muon_learning_rate": 8e-3,
        "learning_rate": 4e-3,
        "schedule": "linear",
        "min_lr_ratio": 0.02,
        "warmup_steps": 60,
    },
}


def recipe_options(recipe: str) -> dict[str, Any]:
    """Return the fields of `OptimizerOptions` that a recipe sets, "plain" (none) or "fast"."""
    if recipe not in _RECIPES:
        raise UsageError(unknown_name("recipe", recipe, _RECIPES))
    return dict(_RECIPES[recipe])


def create_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """Return the optimizer of a model's trainable parameters.

    AdamW (Loshchilov and Hutter 2019) has two groups: matrices with weight decay, biases and norms without. With
    optimizer=muon, Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") updates the
    matrices of linear layers and of adapters, except the output projection; AdamW updates the rest. Muon's updates
    are scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so that the
    same learning rate and weight decay fit. Raises UsageError if Muon would have no matrix or a sharded one.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.optimizer == "adamw":
        return _create_adamw(trained, options)
    hidden = _hidden_matrices(model)
    matrices = [parameter for parameter in trained if parameter in hidden]
    if not matrices:
        raise UsageError("optimizer=muon: no matrix of a linear layer is trained in this model: use optimizer=adamw")
    require_whole(matrices)
    rate = options.learning_rate if options.muon_learning_rate is None else options.muon_learning_rate
    muon = Muon(
        [{"params": matrices, _RATE_RATIO: rate / options.learning_rate}],
        lr=rate,
        weight_decay=options.weight_decay,
        momentum=options.muon_momentum,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(muon, _create_adamw([p for p in trained if p not in hidden], options))


def _create_adamw(trained: Sequence[nn.Parameter], options: OptimizerOptions) -> AdamW:
    return AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def _hidden_matrices(model: Any) -> set[nn.Parameter]:
    """Return the matrices of linear layers without the output projection, tied or not."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        raise UsageError(
            f"optimizer=muon: {type(model).__name__} does not tell its output projection (get_output_embeddings), "
            "which Muon must not update: use optimizer=adamw"
        )
    # Conv1D is the linear layer of transformers' GPT-2.
    found: set[Any] = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    return found.difference(output.parameters())


def learning_rate_at(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """Return the learning rate of step 0, 1, ... of `total_steps`.

    It rises linearly over `warmup_steps`. Then cosine (Loshchilov and Hutter 2017) and linear decay to `min_lr_ratio`
    of the peak at the last step; wsd (Hu et al. 2024) keeps the peak and decays linearly in the last `decay_ratio` of
    the steps; constant keeps the peak.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    low = options.min_lr_ratio
    start = options.warmup_steps
    if options.schedule == "wsd":
        start = max(start, total_steps - round(total_steps * options.decay_ratio))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
    if options.schedule == "constant":
        factor = 1.0
    elif options.schedule == "cosine":
        factor = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = 1.0 - (1.0 - low) * progress
    return options.learning_rate * factor


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of a step in all parameter groups, times the ratio of the group.

    The rate is a function of the step, so there is no scheduler state to save.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATE_RATIO, 1.0)
