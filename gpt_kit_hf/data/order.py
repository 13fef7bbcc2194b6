"""The order in which training meets its samples: a function of the seed alone, known at any place in it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from gpt_kit_hf.errors import UsageError

# A mixture keeps its proportions within each run of so many samples.
_MIXTURE_BLOCK = 4096


class Order(Protocol):
    """Which sample a run takes when."""

    @property
    def samples(self) -> int:
        """How many samples make an epoch, 0 if there is none."""

    def ids(self, consumed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the samples that a run takes after so many others."""


def shuffled(positions: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return where a pseudo-random permutation of 0..size-1, drawn by (seed, epoch), sends `positions`.

    Needs no memory and no earlier position, so that a run continues anywhere at no cost. A Feistel network (Luby and
    Rackoff 1988) over the next even power of two; values beyond `size` walk on until they fall inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = _mixed(np.uint64(seed % 2**64) ^ _mixed(np.arange(6, dtype=np.uint64) + np.uint64(6 * epoch + 1)))

    def permuted(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        joined: npt.NDArray[np.uint64] = (left << shift) | right
        return joined

    values = permuted(positions.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = permuted(values[outside])
    return values.astype(np.int64)


def _mixed(values: Any) -> Any:
    """Return 64-bit values scrambled: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class ShuffledOrder:
    """All samples once an epoch, in an order of its own."""

    samples: int
    seed: int

    def ids(self, consumed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the samples that a run takes after so many others."""
        epochs = consumed // self.samples
        ids = np.empty_like(consumed)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = shuffled(consumed[chosen] % self.samples, self.samples, self.seed, int(epoch))
        return ids


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """Samples as they come, of which there is no end: `samples` is 0."""

    samples: int = 0

    def ids(self, consumed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the samples that a run takes after so many others."""
        return consumed


@dataclass(frozen=True, kw_only=True)
class MixtureOrder:
    """Sources of `sizes` samples, end to end, met in proportion to `weights`.

    Of each 4,096 samples of a run a source gives its share, to the nearest whole one, in places drawn by the seed.
    Each source is shuffled by itself and begins anew when all its samples were met, whatever the others do; an epoch
    is as many samples as there are in all of them.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.weights)
        assert min(self.sizes) > 0
        if 0 in self.quotas:
            raise UsageError(
                f"mixture weights {', '.join(f'{weight:g}' for weight in self.weights)}: the smallest is below "
                f"1/{_MIXTURE_BLOCK} of their sum, too small to be met"
            )

    @property
    def samples(self) -> int:
        """How many samples the sources have together."""
        return sum(self.sizes)

    @property
    def quotas(self) -> tuple[int, ...]:
        """How many of each 4,096 samples a source gives, by largest remainder."""
        exact = np.array(self.weights) / sum(self.weights) * _MIXTURE_BLOCK
        given = np.floor(exact).astype(int)
        given[np.argsort(given - exact, kind="stable")[: _MIXTURE_BLOCK - given.sum()]] += 1
        return tuple(given.tolist())

    def ids(self, consumed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the samples that a run takes after so many others."""
        blocks, places = np.divmod(consumed, _MIXTURE_BLOCK)
        sources, ranks = np.empty_like(consumed), np.empty_like(consumed)
        for block in np.unique(blocks):
            inside = blocks == block
            by_place = _mixture_block(self.quotas, self.seed, int(block))
            sources[inside], ranks[inside] = (column[places[inside]] for column in by_place)
        ids = np.empty_like(consumed)
        for source, size in enumerate(self.sizes):
            own = sources == source
            taken = blocks[own] * self.quotas[source] + ranks[own]
            seed = int(_mixed(np.uint64((self.seed + (source + 1) * 0x9E3779B97F4A7C15) % 2**64)))
            ids[own] = ShuffledOrder(samples=size, seed=seed).ids(taken) + sum(self.sizes[:source])
        return ids


@functools.lru_cache(maxsize=2)  # a step lies in one block, or in two
def _mixture_block(
    quotas: tuple[int, ...], seed: int, block: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return for each place in a block its source, and how many of the same source the block has before it."""
    bounds = np.concatenate(([0], np.cumsum(quotas)))
    order = shuffled(np.arange(_MIXTURE_BLOCK), _MIXTURE_BLOCK, seed, block)
    sources = np.searchsorted(bounds, order, side="right") - 1
    by_source = np.argsort(sources, kind="stable")
    ranks = np.empty_like(sources)
    ranks[by_source] = np.arange(_MIXTURE_BLOCK) - bounds[sources[by_source]]
    return sources, ranks


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which samples each step trains on: the next `batch_size` of the order.

    The processes share a step's batch in equal runs, and cut theirs into micro-batches: neither changes the batch.
    """

    order: Order
    batch_size: int
    micro_batch_size: int
    num_processes: int = 1
    process_index: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.num_processes:
            raise UsageError(
                f"batch_size={self.batch_size} must be divisible by the number of processes, {self.num_processes}"
            )

    @property
    def micro_steps(self) -> int:
        """How many micro-batches a process computes for a step."""
        return -(-self.batch_size // self.num_processes // self.micro_batch_size)

    def sample_ids(self, step: int) -> npt.NDArray[np.int64]:
        """Return the ids (batch_size,) of the samples of step 0, 1, ..., over all processes."""
        consumed = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        return self.order.ids(consumed)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the ids of this process's micro-batches of a step."""
        share = self.batch_size // self.num_processes
        own = self.sample_ids(step)[self.process_index * share : (self.process_index + 1) * share].tolist()
        return [own[first : first + self.micro_batch_size] for first in range(0, share, self.micro_batch_size)]


class PlannedBatches(Sampler[list[int]]):
    """The micro-batches of the steps first_step..last_step-1, in their order."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self.plan, self.first_step, self.last_step = plan, first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            yield from self.plan.micro_batches(step)
