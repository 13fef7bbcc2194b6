"""Creates the optimizer of a model, and computes the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.training import OptimizerOptions, steps_of
from gpt_kit_hf.training.optim.muon import ROW_BETA2, MuonWithAdamW, check_matrices

# Key of a parameter group: its learning rate divided by that of the step; 1 if missing.
_RATE_RATIO = "rate_ratio"


def create_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """Return the optimizer of a model's trainable parameters.

    AdamW (Loshchilov and Hutter 2019) has two groups: matrices with weight decay, biases and norms without. With
    optimizer=muon, Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") updates the
    matrices of linear layers and of adapters, except the output projection; AdamW updates the rest. Muon's updates
    are scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so that the
    same learning rate and weight decay fit; with muon_beta2, each row is. Raises UsageError if Muon would have no
    matrix, or one that is sharded otherwise than by FSDP2.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.optimizer == "adamw":
        return _create_adamw(trained, options)
    hidden = _hidden_matrices(model)
    matrices = [parameter for parameter in trained if parameter in hidden]
    if not matrices:
        raise UsageError("optimizer=muon: no matrix of a linear layer is trained in this model: use optimizer=adamw")
    check_matrices(matrices)
    rate = options.learning_rate if options.muon_learning_rate is None else options.muon_learning_rate
    muon = Muon(
        [{"params": matrices, _RATE_RATIO: rate / options.learning_rate, ROW_BETA2: options.muon_beta2}],
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
        betas=(options.adam_beta1, options.adam_beta2),
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
    of the peak at the last step; warmup_stable_decay (Hu et al. 2024) keeps the peak and decays linearly in the last
    `decay_ratio` of the steps; constant_with_warmup keeps the peak.
    """
    start = steps_of(options.warmup_steps, total_steps)
    if step < start:
        return options.learning_rate * (step + 1) / start
    low = options.min_lr_ratio
    if options.lr_scheduler_type == "warmup_stable_decay":
        start = max(start, total_steps - round(total_steps * options.decay_ratio))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
    if options.lr_scheduler_type == "constant_with_warmup":
        factor = 1.0
    elif options.lr_scheduler_type == "cosine":
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
