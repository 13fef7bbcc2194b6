"""An exponential moving average of the trained weights, which is evaluated and saved instead of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_kit_hf.training.state.sharded_state import local_part, reshard

_AVERAGE = "average"  # key of a parameter's state


class WeightAverage:
    """The exponential moving average of an optimizer's parameters, exchanged with them; nothing without `decay`.

    The average is part of the optimizer's state, so it is sharded, saved and restored with that. A checkpoint holds
    the average as its model, and the weights that training goes on with in the optimizer's state: both are exchanged
    while it is written, and after it was loaded.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, decay: float | None) -> None:
        self._model, self._optimizer, self._decay = model, optimizer, decay
        self._is_in_model = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0.

        The decay rises with the steps, (1 + step) / (10 + step), up to the one that was asked for: the first weights,
        which are random, are soon forgotten.
        """
        if self._decay is None:
            return
        for parameter, state in self._optimizer.state.items():
            # Not before the optimizer has state of its own: it would not be initialised any more.
            if state and _AVERAGE not in state:
                state[_AVERAGE] = parameter.detach().clone()
        weights, averages = self._pairs()
        if weights:
            torch._foreach_lerp_(averages, weights, 1.0 - min(self._decay, (1 + step) / (10 + step)))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model have the average, until the end of the block."""
        if self._is_in_model:
            yield
            return
        self.exchange()
        self._is_in_model = True
        try:
            yield
        finally:
            self._is_in_model = False
            self.exchange()

    def stay_in_model(self) -> None:
        """Let the model have the average from now on: training has ended."""
        self.exchange()
        self._is_in_model = True

    @torch.no_grad()
    def exchange(self) -> None:
        """Exchange the weights of the model and the average, in place."""
        if self._decay is None:
            return
        reshard(self._model)  # weights that FSDP2 has gathered for an evaluation are those of before
        for weight, average in zip(*self._pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights that have an average, and these, the parts that this process holds."""
        found = [(p.detach(), state[_AVERAGE]) for p, state in self._optimizer.state.items() if _AVERAGE in state]
        return [local_part(weight) for weight, _ in found], [local_part(average) for _, average in found]
