"""The optimizer and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.training import OptimizerOptions
from gpt_kit_hf.training.optim.muon import BatchedMuon

# The key of a parameter group that tells its share of the learning rate of a step, if that is not the whole.
_RATE_RATIO = "rate_ratio"


class MuonWithAdamW(Optimizer):
    """Muon and AdamW as one optimizer: their parameter groups, Muon's first, and one state for both.

    A group that is added later is AdamW's. `step` raises UsageError, with nothing changed, if a matrix of Muon's has
    been sharded: its update is not that of its parts.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Accelerate replaces parameters by their shards in the groups when it prepares a model.
        _require_whole(parameter for group in self.muon.param_groups for parameter in group["params"])
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that AdamW updates."""
        known = [*self.muon.param_groups, *self.adamw.param_groups]
        super().add_param_group(param_group)
        if all(param_group is not group for group in known):
            self.adamw.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "muon": self.muon, "adamw": self.adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict brings new groups and a new state by this.
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Give both optimizers their groups of this one, the very objects, and its state."""
        count = len(self.muon.param_groups)
        self.muon.__setstate__({"state": self.state, "param_groups": self.param_groups[:count]})
        self.adamw.__setstate__(  # type: ignore[no-untyped-call]
            {"state": self.state, "param_groups": self.param_groups[count:]}
        )


def _require_whole(matrices: Iterable[torch.Tensor]) -> None:
    for matrix in matrices:
        if matrix.dim() != 2 or _is_dtensor(matrix):
            shape = tuple(matrix.shape)
            raise UsageError(
                f"optimizer=muon needs whole matrices, one of shape {shape} is sharded: use optimizer=adamw"
            )


def _is_dtensor(tensor: torch.Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # a torch without torch.distributed lacks it

    return isinstance(tensor, DTensor)


def create_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """Return the optimizer of the parameters that are trained.

    AdamW (Loshchilov and Hutter 2019) comes in two groups: matrices decay, biases and norms do not. Muon (Jordan et
    al. 2024, "Muon: An optimizer for hidden layers in neural networks") takes the matrices of linear layers, adapters
    included, but the output projection; embeddings and all else stay with AdamW. Its updates are scaled to the size
    of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so that the same learning rate and
    decay fit. Raises UsageError if Muon would have no matrix, or a sharded one.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.optimizer == "adamw":
        return _create_adamw(trained, options)
    hidden = _hidden_matrices(model)
    matrices = [parameter for parameter in trained if parameter in hidden]
    if not matrices:
        raise UsageError("optimizer=muon: no matrix of a linear layer is trained in this model: use optimizer=adamw")
    _require_whole(matrices)
    rate = options.learning_rate if options.muon_learning_rate is None else options.muon_learning_rate
    muon = BatchedMuon(
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
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def _hidden_matrices(model: Any) -> set[nn.Parameter]:
    """Return the matrices of linear layers but the output projection, which counts as an embedding even untied."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        raise UsageError(
            f"optimizer=muon: {type(model).__name__} does not tell its output projection (get_output_embeddings), "
            "which Muon must leave out: use optimizer=adamw"
        )
    # GPT-2 of transformers has linear layers of its own kind.
    found: set[Any] = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    return found.difference(output.parameters())


def learning_rate_at(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """Return the learning rate of step 0, 1, ... of `total_steps`.

    It rises linearly over `warmup_steps`, then: cosine falls along half a cosine (Loshchilov and Hutter 2017),
    linear along a line, to `min_lr_ratio` of the peak; warmup_stable_decay stays, and falls along a line in the last
    `decay_ratio` of the steps (Hu et al. 2024); constant_with_warmup stays.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    low = options.min_lr_ratio
    start = options.warmup_steps
    if options.lr_scheduler_type == "warmup_stable_decay":
        start = max(start, total_steps - round(total_steps * options.decay_ratio))
    # The last step, total_steps - 1, has the lowest rate.
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
    if options.lr_scheduler_type == "constant_with_warmup":
        factor = 1.0
    elif options.lr_scheduler_type == "cosine":
        factor = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = 1.0 - (1.0 - low) * progress
    return options.learning_rate * factor


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give all groups the learning rate of a step, or their share of it.

    The rate is a function of the step, so there is no scheduler whose state could be lost or step too often.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATE_RATIO, 1.0)
