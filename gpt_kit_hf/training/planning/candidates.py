"""The shapes that a plan chooses from, and what a step of each takes on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.model import ModelOptions
from gpt_kit_hf.options.training import OptimizerOptions
from gpt_kit_hf.training.cost import StepCost, measure_cost, random_rows
from gpt_kit_hf.training.optim.optimizer import create_optimizer
from gpt_kit_hf.training.planning.law import layer_parameters
from gpt_kit_hf.training.trainer import AMPTrainer

# Layers, heads and width of modern shapes, each about twice the work of the one before.
SHAPES = (
    (2, 2, 64), (2, 4, 128), (4, 4, 128), (4, 6, 192), (4, 4, 256), (6, 4, 256), (6, 6, 384), (8, 6, 384), (8, 8, 512),
    (12, 12, 768), (24, 16, 1024), (48, 25, 1600),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape, its parameters, and the time and memory of a step of `step_tokens` tokens.

    `layer_parameters` are those of the blocks alone, by which the law counts.
    """

    layers: int
    heads: int
    width: int
    parameters: int
    layer_parameters: int
    step_tokens: int
    cost: StepCost

    @property
    def seconds_per_token(self) -> float:
        """The time of a trained token."""
        return self.cost.seconds / self.step_tokens


class Timing:
    """Times steps of shapes with the vocabulary, context and precision of a run."""

    def __init__(
        self,
        model: ModelOptions,
        optimizer: OptimizerOptions,
        accelerator: Accelerator,
        mixed_precision: str,
        vocab_size: int,
    ) -> None:
        self._model, self._optimizer, self._accelerator = model, optimizer, accelerator
        self._precision, self._vocab_size = mixed_precision, vocab_size

    def candidate(self, shape: tuple[int, int, int], context: int, batch_size: int) -> Candidate:
        """Return a shape with the cost of a step of `batch_size` x `context` tokens, computed a few times."""
        layers, heads, width = shape
        chosen = replace(self._model, n_layer=layers, n_head=heads, n_embd=width, max_position_embeddings=context)
        with torch.random.fork_rng(devices=[]):
            model = GPTKitForCausalLM(build_config(chosen, vocab_size=self._vocab_size))
        trainer = AMPTrainer(
            model,
            create_optimizer(model, self._optimizer),
            mixed_precision=self._precision,
            accelerator=self._accelerator,
        )
        cost = measure_cost(
            model,
            trainer.optimizer.optimizer,
            random_rows(self._vocab_size, context),
            micro_batch_size=batch_size,
            autocast=trainer.autocast,
        )
        return Candidate(
            layers=layers,
            heads=heads,
            width=width,
            parameters=model.num_parameters(),
            layer_parameters=layer_parameters(layers, width),
            step_tokens=batch_size * context,
            cost=cost,
        )


def allowed_shapes(given: Mapping[str, Any], blocks: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Yield layers, heads and width of shapes, the smallest first, with what was given of them.

    `blocks` are those of the options: the only ones if a preset or all three were given.
    """
    fixed = [given.get(name) for name in ("n_layer", "n_head", "n_embd")]
    if given.get("model") is not None or None not in fixed:
        yield blocks
        return
    found = dict[tuple[int, int, int], None]()
    for shape in SHAPES:
        layers, heads, width = (one or other for one, other in zip(fixed, shape, strict=True))
        if width % (2 * heads) == 0:  # rotary positions need heads of an even width
            found[layers, heads, width] = None
    yield from found
