"""The order of training samples: a function of the seed and the position, so that a run resumes at any step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gpt_kit_hf.errors import UsageError

Ints: TypeAlias = npt.NDArray[np.int64]

# A mixture has its exact proportions within each block of this many samples.
_MIXTURE_BLOCK = 4096


class Order(Protocol):
    """The order in which a run takes its samples."""

    @property
    def samples(self) -> int:
        """The number of samples in an epoch; 0 for an endless stream."""

    def ids(self, consumed: Ints) -> Ints:
        """Return the sample ids that a run takes at these positions, counted from the start of the run."""


def shuffled(positions: Ints, size: int, seed: int, epoch: int) -> Ints:
    """Return the values at `positions` of a pseudo-random permutation of 0..size-1, drawn by (seed, epoch).

    Each value is computed by itself, without memory, so that a run resumes anywhere at no cost: a Feistel network
    (Luby and Rackoff 1988) over the next even power of two, applied again to values outside of the range.
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
    """Return 64-bit values after the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class ShuffledOrder:
    """Each sample once per epoch, in a new order each epoch.

    With `reshuffled`, the samples of each epoch are others: those of epoch e have the ids from e * samples on.
    """

    samples: int
    seed: int
    reshuffled: bool = False

    def ids(self, consumed: Ints) -> Ints:
        """Return the sample ids at these positions, (n,) -> (n,)."""
        epochs = consumed // self.samples
        ids = np.empty_like(consumed)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = shuffled(consumed[chosen] % self.samples, self.samples, self.seed, int(epoch))
        return ids + epochs * self.samples if self.reshuffled else ids


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """The samples of an endless stream, as they come."""

    samples: int = 0

    def ids(self, consumed: Ints) -> Ints:
        """Return the positions themselves."""
        return consumed


@dataclass(frozen=True, kw_only=True)
class MixtureOrder:
    """Sources of `sizes` samples, concatenated, drawn in proportion to `weights`.

    Each block of 4,096 samples has the same number from each source, the nearest to its weight, at places drawn by
    the seed. Each source is shuffled by itself and starts over when it is used up. An epoch has as many samples as
    all sources together. With `reshuffled`, a source has other samples each time: the ids of the next time are higher
    by `samples`.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    reshuffled: bool = False

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.weights)
        assert min(self.sizes) > 0
        if 0 in self.quotas:
            raise UsageError(
                f"mixture weights {', '.join(f'{weight:g}' for weight in self.weights)}: the smallest is below "
                f"1/{_MIXTURE_BLOCK} of their sum, so its source would never be drawn; raise it or leave it out"
            )

    @property
    def samples(self) -> int:
        """The number of samples of all sources together."""
        return sum(self.sizes)

    @property
    def quotas(self) -> tuple[int, ...]:
        """The number of samples of each source in a block, by the largest-remainder method."""
        exact = np.array(self.weights) / sum(self.weights) * _MIXTURE_BLOCK
        quotas = np.floor(exact).astype(int)
        quotas[np.argsort(quotas - exact, kind="stable")[: _MIXTURE_BLOCK - quotas.sum()]] += 1
        return tuple(quotas.tolist())

    def ids(self, consumed: Ints) -> Ints:
        """Return the sample ids at these positions, (n,) -> (n,)."""
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
            if self.reshuffled:
                ids[own] += taken // size * self.samples
        return ids


@functools.lru_cache(maxsize=2)  # a step reads one block, or two at its edge
def _mixture_block(quotas: tuple[int, ...], seed: int, block: int) -> tuple[Ints, Ints]:
    """Return, for each place in a block, its source and the number of earlier places with the same source."""
    bounds = np.concatenate(([0], np.cumsum(quotas)))
    order = shuffled(np.arange(_MIXTURE_BLOCK), _MIXTURE_BLOCK, seed, block)
    sources = np.searchsorted(bounds, order, side="right") - 1
    by_source = np.argsort(sources, kind="stable")
    ranks = np.empty_like(sources)
    ranks[by_source] = np.arange(_MIXTURE_BLOCK) - bounds[sources[by_source]]
    return sources, ranks


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The samples of each step: the next `batch_size` of the order.

    Each process takes an equal, consecutive share of the batch and divides it into micro-batches. Neither the number
    of processes nor the micro-batch size changes the batch.
    """

    order: Order
    batch_size: int
    micro_batch_size: int
    num_processes: int = 1
    process_index: int = 0

    def __post_init__(self) -> None:
        for name, size in (("batch_size", self.batch_size), ("micro_batch_size", self.micro_batch_size)):
            if size < 1:
                raise UsageError(f"{name} must be at least 1, got {size}")
        if self.batch_size % self.num_processes:
            raise UsageError(
                f"batch_size={self.batch_size} must be divisible by the number of processes, {self.num_processes}"
            )

    @property
    def micro_steps(self) -> int:
        """The number of micro-batches per process and step."""
        return -(-self.batch_size // self.num_processes // self.micro_batch_size)

    def sample_ids(self, step: int) -> Ints:
        """Return the sample ids (batch_size,) of a step, counted from 0, over all processes."""
        return self.order.ids(np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the sample ids of this process's micro-batches of a step."""
        share = self.batch_size // self.num_processes
        own = self.sample_ids(step)[self.process_index * share : (self.process_index + 1) * share].tolist()
        return [own[first : first + self.micro_batch_size] for first in range(0, share, self.micro_batch_size)]


class PlannedBatches:
    """The micro-batches of the steps first_step..last_step-1, in order, as a batch sampler."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self.plan, self.first_step, self.last_step = plan, first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            yield from self.plan.micro_batches(step)
