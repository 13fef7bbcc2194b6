"""The shapes that a plan chooses from, and what a step of each takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.model import ModelOptions
from gpt_kit_hf.options.training import OptimizerOptions
from gpt_kit_hf.training.needs.cost import StepCost, measure_cost, random_rows
from gpt_kit_hf.training.optim.optimizer import create_optimizer
from gpt_kit_hf.training.planning.law import layer_parameters
from gpt_kit_hf.training.runtime.compilation import compile_blocks
from gpt_kit_hf.training.runtime.memory import release_freed_memory
from gpt_kit_hf.training.trainer import AMPTrainer

SHAPE_OPTIONS = ("n_layer", "n_head", "n_embd")
# Layers, heads and width of modern shapes, each about twice the work of the one before.
SHAPES = (
    (2, 2, 64), (2, 4, 128), (4, 4, 128), (4, 6, 192), (4, 4, 256), (6, 4, 256), (6, 6, 384), (8, 6, 384), (8, 8, 512),
    (12, 12, 768), (24, 16, 1024), (48, 25, 1600),
)  # fmt: skip

_COMPILED_STEPS = 3  # steps with compiled blocks, and without, whose medians count


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape, its parameters, and the time and memory of a step of `batch_size` x `context` tokens.

    `layer_parameters` are those of the blocks alone, by which the law counts. `timed` says that the cost was measured.
    """

    layers: int
    heads: int
    width: int
    parameters: int
    layer_parameters: int
    batch_size: int
    context: int
    cost: StepCost
    timed: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads and width."""
        return self.layers, self.heads, self.width

    @property
    def size(self) -> str:
        """Layers and width in words."""
        return f"{self.layers} layer{'s' * (self.layers > 1)} of {self.width}"

    @property
    def step_tokens(self) -> int:
        """The tokens of a step."""
        return self.batch_size * self.context

    @property
    def seconds_per_token(self) -> float:
        """The time of a trained token."""
        return self.cost.seconds / self.step_tokens


@dataclass(frozen=True, kw_only=True)
class CompiledSeconds:
    """The times of a step, of the first one with compiled blocks, which compiles them, and of a later one."""

    uncompiled: float
    first: float
    compiled: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times steps of shapes with the vocabulary, context and precision of a run.

    `micro_batch_size` is that of the run, None for the whole batch.
    """

    model: ModelOptions
    optimizer: OptimizerOptions
    accelerator: Accelerator
    mixed_precision: str
    vocab_size: int
    context: int
    micro_batch_size: int | None = None

    def candidate(self, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        """Return a shape with the cost of a step of `batch_size` sequences, computed a few times.

        The memory that this takes is free afterwards.
        """
        try:
            return self._measured(shape, batch_size)
        finally:
            self._release()

    def _measured(self, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        model, trainer = self._trainer(shape)
        micro, micro_steps = self._micro_batches(batch_size)
        cost = measure_cost(
            model,
            trainer.optimizer.optimizer,
            random_rows(self.vocab_size, self.context),
            micro_batch_size=micro,
            micro_steps=micro_steps,
            autocast=trainer.autocast,
        )
        return self._made(shape, batch_size, model.num_parameters(), cost)

    def compiled(self, candidate: Candidate) -> CompiledSeconds | None:
        """Return the time of a step of a shape with compiled blocks, None if the machine cannot compile them."""
        try:
            return self._compiled(candidate)
        finally:
            self._release()

    def _compiled(self, candidate: Candidate) -> CompiledSeconds | None:
        model, trainer = self._trainer(candidate.shape)
        if not compile_blocks(model, wanted=True, device=self.accelerator.device, log=lambda _: None):
            return None
        micro, micro_steps = self._micro_batches(candidate.batch_size)
        batches = [random_rows(self.vocab_size, self.context)(micro)] * micro_steps

        def seconds(steps: int) -> float:
            """Return the median time of some steps."""
            taken = list[float]()
            for _ in range(steps):
                began = time.perf_counter()
                trainer.update(batches)
                taken.append(time.perf_counter() - began)
            return statistics.median(taken)

        with torch.compiler.set_stance("force_eager"):
            uncompiled = seconds(_COMPILED_STEPS)
        try:
            return CompiledSeconds(uncompiled=uncompiled, first=seconds(1), compiled=seconds(_COMPILED_STEPS))
        except Exception:  # torch has no class for the errors of its compiler
            return None

    def estimated(self, shape: tuple[int, int, int], like: Candidate) -> Candidate:
        """Return a shape with a cost that is to that of another shape as are their parameters."""
        parameters = self.parameters(shape)
        factor = parameters / like.parameters
        cost = StepCost(
            seconds=like.cost.seconds * factor,
            peak_bytes=round(like.cost.peak_bytes * factor),
            state_bytes=round(like.cost.state_bytes * factor),
        )
        return replace(self._made(shape, like.batch_size, parameters, cost), timed=False)

    def parameters(self, shape: tuple[int, int, int]) -> int:
        """Return the number of parameters of a shape, without making it."""
        layers, heads, width = shape
        with torch.device("meta"):
            one, two = (GPTKitForCausalLM(self._config((few, heads, width))).num_parameters() for few in (1, 2))
        return int(one + (layers - 1) * (two - one))

    def _trainer(self, shape: tuple[int, int, int]) -> tuple[GPTKitForCausalLM, AMPTrainer]:
        with torch.random.fork_rng(devices=[]):
            model = GPTKitForCausalLM(self._config(shape))
        optimizer = create_optimizer(model, self.optimizer)
        trainer = AMPTrainer(model, optimizer, mixed_precision=self.mixed_precision, accelerator=self.accelerator)
        return model, trainer

    def _release(self) -> None:
        """Free the model that was timed, which Accelerate keeps, and what the allocator keeps."""
        self.accelerator.free_memory()
        release_freed_memory()

    def _micro_batches(self, batch_size: int) -> tuple[int, int]:
        """Return the size of a micro-batch, and how many of them a step has."""
        micro = min(batch_size, self.micro_batch_size or batch_size)
        return micro, -(-batch_size // micro)

    def _config(self, shape: tuple[int, int, int]) -> GPTKitConfig:
        layers, heads, width = shape
        chosen = replace(self.model, n_layer=layers, n_head=heads, n_embd=width, max_position_embeddings=self.context)
        return build_config(chosen, vocab_size=self.vocab_size)

    def _made(self, shape: tuple[int, int, int], batch_size: int, parameters: int, cost: StepCost) -> Candidate:
        layers, heads, width = shape
        return Candidate(
            layers=layers,
            heads=heads,
            width=width,
            parameters=parameters,
            layer_parameters=layer_parameters(layers, width),
            batch_size=batch_size,
            context=self.context,
            cost=cost,
        )


def allowed_shapes(given: Mapping[str, Any], blocks: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Yield layers, heads and width of shapes, the smallest first, with what was given of them.

    `blocks` are those of the options: the only ones if a preset or all three were given. Where one of heads and width
    was given, the other is the nearest that fits it.
    """
    fixed = [given.get(name) for name in SHAPE_OPTIONS]
    if given.get("model") is not None or None not in fixed:
        yield blocks
        return
    _, own_heads, own_width = fixed
    even = 1 if given.get("head_dim") else 2  # heads of an even width, as rotary positions need it
    grouped = given.get("num_key_value_heads") or 1
    found = dict[tuple[int, int], int]()  # the heads by layers and width
    for shape in SHAPES:
        layers, heads, width = (one or other for one, other in zip(fixed, shape, strict=True))
        if own_heads and not own_width and even == 2:
            width = even * heads * max(1, round(width / (even * heads)))
        fits = [n for n in range(grouped, width + 1, grouped) if even == 1 or width % (even * n) == 0]
        if own_heads:
            fits = [n for n in fits if n == own_heads]
        if fits:
            found.setdefault((layers, width), min(fits, key=lambda n: abs(n - heads)))
    yield from ((layers, heads, width) for (layers, width), heads in found.items())
