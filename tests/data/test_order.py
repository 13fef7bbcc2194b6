"""The order of samples, and the batches cut from it."""

from __future__ import annotations

import json
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from children import start_child
from torch.utils.data import DataLoader

from gpt_kit_hf.data.order import BatchPlan, MixtureOrder, Order, PlannedBatches, ShuffledOrder, shuffled
from gpt_kit_hf.errors import UsageError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_an_epoch_is_a_permutation_that_follows_from_seed_and_epoch(size: int) -> None:
    positions = np.arange(size)
    orders = [shuffled(positions, size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), positions)
    np.testing.assert_array_equal(
        orders[0],
        np.concatenate([shuffled(positions[i : i + 1], size, 0, 0) for i in positions[:50]] + [orders[0][50:]]),
    )
    if size >= 64:
        assert all(not np.array_equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_is_well_mixed() -> None:
    """Neighbours in an epoch are as far apart as in a random permutation: a third of the size on average."""
    size = 10_000
    order = shuffled(np.arange(size), size, seed=5, epoch=2)
    apart = np.abs(np.diff(order)).mean() / size
    assert abs(apart - 1 / 3) < 0.01
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03


@pytest.mark.parametrize(("processes", "micro"), [(1, 12), (1, 5), (2, 6), (2, 4), (4, 1), (4, 3)])
def test_a_batch_is_the_same_for_any_processes_and_micro_batches(processes: int, micro: int) -> None:
    alone = BatchPlan(order=ShuffledOrder(samples=31, seed=7), batch_size=12, micro_batch_size=12)
    plans = [
        BatchPlan(
            order=ShuffledOrder(samples=31, seed=7),
            batch_size=12,
            micro_batch_size=micro,
            num_processes=processes,
            process_index=rank,
        )
        for rank in range(processes)
    ]
    for step in range(8):
        shares = [[i for part in plan.micro_batches(step) for i in part] for plan in plans]
        assert [i for share in shares for i in share] == alone.sample_ids(step).tolist()
        assert all(len(plan.micro_batches(step)) == plan.micro_steps for plan in plans)


def test_each_epoch_visits_each_sample_once_across_batches() -> None:
    plan = BatchPlan(order=ShuffledOrder(samples=31, seed=7), batch_size=12, micro_batch_size=12)
    visited = np.concatenate([plan.sample_ids(step) for step in range(31)])
    for epoch in range(12):
        np.testing.assert_array_equal(np.sort(visited[epoch * 31 : (epoch + 1) * 31]), np.arange(31))


# --- mixtures

BLOCK = 4096


def by_source(order: MixtureOrder, ids: np.ndarray) -> list[np.ndarray]:
    """Each source's samples in the order of use, numbered from 0."""
    bounds = np.cumsum([0, *order.sizes])
    return [ids[(a <= ids) & (ids < b)] - a for a, b in pairwise(bounds.tolist())]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ((5000, 40), (1.0, 1.0)),
        ((300, 9000, 77), (0.7, 0.2, 0.1)),
        ((3, 1, 10), (1.0, 3.0, 1.0)),
        ((50, 60, 70), (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_a_mixture_keeps_its_proportions_in_every_block(
    sizes: tuple[int, ...], weights: tuple[float, ...], seed: int
) -> None:
    order = MixtureOrder(sizes=sizes, weights=weights, seed=seed)
    assert order.samples == sum(sizes)
    assert sum(order.quotas) == BLOCK
    for quota, weight in zip(order.quotas, weights, strict=True):
        assert abs(quota - weight / sum(weights) * BLOCK) < 1
    met = np.zeros(sum(sizes), int)
    for block in range(4):
        ids = order.ids(np.arange(block * BLOCK, (block + 1) * BLOCK))
        assert tuple(map(len, by_source(order, ids))) == order.quotas
        met += np.bincount(ids, minlength=met.size)
        first = 0
        for size, quota in zip(sizes, order.quotas, strict=True):
            # After whole blocks every sample of a source was used equally often, except in the current epoch.
            times, over = divmod(quota * (block + 1), size)
            counts = np.bincount(met[first : first + size] - times, minlength=2)
            assert counts.tolist() == [size - over, over]
            first += size


@pytest.mark.parametrize(("sizes", "weights"), [((5000, 40), (1.0, 1.0)), ((300, 900, 77), (0.7, 0.2, 0.1))])
def test_a_source_starts_over_when_all_its_samples_were_used(
    sizes: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    order = MixtureOrder(sizes=sizes, weights=weights, seed=3)
    for size, met in zip(sizes, by_source(order, order.ids(np.arange(4 * BLOCK))), strict=True):
        epochs = [met[first : first + size] for first in range(0, len(met) - size + 1, size)]
        assert epochs
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
        assert not any(np.array_equal(a, b) for a, b in pairwise(epochs))


def test_a_mixture_can_be_computed_at_any_position() -> None:
    order = MixtureOrder(sizes=(300, 9000, 77), weights=(0.7, 0.2, 0.1), seed=3)
    whole = order.ids(np.arange(3 * BLOCK))
    rng = np.random.default_rng(0)
    for _ in range(100):
        places = rng.integers(0, 3 * BLOCK, size=rng.integers(1, 40))
        np.testing.assert_array_equal(order.ids(places), whole[places])
    assert not np.array_equal(
        MixtureOrder(sizes=order.sizes, weights=order.weights, seed=4).ids(places), whole[places]
    )


def test_sources_of_a_mixture_are_interleaved() -> None:
    order = MixtureOrder(sizes=(3000, 3000), weights=(1.0, 1.0), seed=0)
    second = order.ids(np.arange(BLOCK)) >= 3000
    assert abs(second.reshape(8, -1).sum(axis=1) - 256).max() < 60
    assert np.flatnonzero(np.diff(second.astype(int))).size > 1800


def test_a_weight_too_small_to_be_drawn_is_refused() -> None:
    MixtureOrder(sizes=(5, 5), weights=(1.0, 1 / 4095), seed=0)
    with pytest.raises(UsageError, match=r"mixture weights 1, 0.0001: the smallest is below 1/4096 of their sum"):
        MixtureOrder(sizes=(5, 5), weights=(1.0, 0.0001), seed=0)


# --- processes


def test_real_processes_share_the_batches_of_one(tmp_path: Path) -> None:
    """1, 2 and 4 processes write what they would train on."""
    orders: list[Order] = [ShuffledOrder(samples=31, seed=7), MixtureOrder(sizes=(50, 9), weights=(1.0, 2.0), seed=7)]

    def write(rank: int, world: int, micro: int) -> None:
        plans = [
            BatchPlan(order=order, batch_size=12, micro_batch_size=micro, num_processes=world, process_index=rank)
            for order in orders
        ]
        batches = [[plan.micro_batches(step) for step in range(40)] for plan in plans]
        (tmp_path / f"{rank} of {world}").write_text(json.dumps(batches))

    for world, micro in ((1, 5), (2, 4), (4, 2)):
        children = [start_child(partial(write, rank, world, micro)) for rank in range(world)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * world
        shares = [json.loads((tmp_path / f"{rank} of {world}").read_text()) for rank in range(world)]
        for plan, order in enumerate(orders):
            met = [i for step in range(40) for share in shares for part in share[plan][step] for i in part]
            assert met == order.ids(np.arange(12 * 40)).tolist()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_load_the_planned_batches(processes: int, micro: int, workers: int) -> None:
    if workers and (processes, micro) != (2, 2):
        pytest.skip("processes are dear: one cut is enough")
    order = MixtureOrder(sizes=(20, 11), weights=(1.0, 2.0), seed=7)
    shares = []
    for rank in range(processes):
        plan = BatchPlan(
            order=order, batch_size=12, micro_batch_size=micro, num_processes=processes, process_index=rank
        )
        loader: DataLoader[int] = DataLoader(
            range(31),  # type: ignore[arg-type]
            batch_sampler=PlannedBatches(plan, 3, 7),
            num_workers=workers,
            generator=torch.Generator(),
        )
        batches = [batch.tolist() for batch in loader]
        assert len(batches) == len(PlannedBatches(plan, 3, 7)) == 4 * plan.micro_steps
        assert max(map(len, batches)) <= micro
        shares.append(np.concatenate(batches).reshape(4, -1))
    np.testing.assert_array_equal(np.concatenate(shares, axis=1).ravel(), order.ids(np.arange(36, 84)))


def test_ids_of_reshuffled_orders_tell_the_epoch() -> None:
    positions = np.arange(40)
    plain, other = ShuffledOrder(samples=10, seed=3), ShuffledOrder(samples=10, seed=3, reshuffled=True)
    np.testing.assert_array_equal(other.ids(positions), plain.ids(positions) + positions // 10 * 10)
    sizes, weights = (5, 20), (3.0, 1.0)
    mixture = MixtureOrder(sizes=sizes, weights=weights, seed=3, reshuffled=True)
    ids = mixture.ids(np.arange(200))
    np.testing.assert_array_equal(ids % 25, MixtureOrder(sizes=sizes, weights=weights, seed=3).ids(np.arange(200)))
    for low, size in ((0, 5), (5, 20)):  # each source by itself goes through its epochs
        own = ids[(ids % 25 >= low) & (ids % 25 < low + size)]
        np.testing.assert_array_equal(own // 25, np.arange(len(own)) // size)
