"""Divides work on whole matrices over processes: each matrix has an owner, which computes its update for all.

Updates are passed as a stack of matrices of one shape. A process owns consecutive ones of the stack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Compute = Callable[[Tensor], Tensor]  # (n, rows, columns) -> (n, rows, columns), each matrix by itself


def computed_by_replicas(matrices: Tensor, processes: dist.ProcessGroup, compute: Compute) -> Tensor:
    """Return `compute(matrices)`, (N, rows, columns), of matrices that each process has; each computes its share.

    All processes call it together, and get the same to the bit.
    """
    first, count = _owned(len(matrices), processes)[processes.rank()]
    share = -(-len(matrices) // processes.size())  # what all_gather takes is of one size
    own = torch.zeros_like(matrices[:1].expand(share, -1, -1))
    if count:
        own[:count] = compute(matrices[first : first + count])
    found = own.new_empty(processes.size() * share, *own.shape[1:])
    dist.all_gather(list(torch.split(found, share)), own, group=processes)
    return found[: len(matrices)]


def computed_by_owners(shards: Tensor, rows: int, processes: dist.ProcessGroup, compute: Compute) -> Tensor:
    """Return this process's rows of `compute(matrices)`, for matrices of which each process has some rows.

    `shards` are the rows here, (N, rows here, columns) of (N, rows, columns), divided as by `Shard(0)` of a DTensor.
    Each owner receives the rows of its matrices, and sends back those of the result. All processes call it together.
    """
    rank, columns = processes.rank(), shards.shape[2]
    counts = [count for _, count in _owned(len(shards), processes)]
    heights = _heights(rows, processes.size())
    here = [count * shards.shape[1] * columns for count in counts]  # elements of these rows, by owner
    owned = [counts[rank] * height * columns for height in heights]  # elements of these matrices, by process
    received = shards.new_empty(sum(owned))
    dist.all_to_all_single(received, shards.flatten(), owned, here, group=processes)
    pieces = zip(torch.split(received, owned), heights, strict=True)
    # The rows of all processes: (n, height, columns) each -> (n, rows, columns)
    whole = torch.cat([piece.view(counts[rank], height, columns) for piece, height in pieces], dim=1)
    if counts[rank]:
        whole = compute(whole)
    sent = torch.cat([piece.flatten() for piece in torch.split(whole, heights, dim=1)])
    found = torch.empty_like(shards, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found.view(-1), sent, here, owned, group=processes)
    return found


def _owned(matrices: int, processes: dist.ProcessGroup) -> list[tuple[int, int]]:
    """Return for each process the first of its matrices, and how many they are."""
    share = -(-matrices // processes.size())
    firsts = [min(rank * share, matrices) for rank in range(processes.size())]
    return [(first, min(share, matrices - first)) for first in firsts]


def _heights(rows: int, processes: int) -> list[int]:
    """Return how many rows each process has: as many as the first, and the last ones fewer or none."""
    height = -(-rows // processes)
    return [max(0, min(height, rows - rank * height)) for rank in range(processes)]
