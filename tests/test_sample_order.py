"""The order of samples, and the batches cut from it."""

from __future__ import annotations

import numpy as np
import pytest

from gpt_kit_hf.sample_order import BatchPlan, ShuffledOrder, shuffled


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
