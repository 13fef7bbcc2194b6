"""Muon divided over processes, against Muon in one process that holds all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_optimizer import NORMUON, give_gradients, tiny_model
from torch import Tensor
from torch.distributed import group as groups
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt_kit_hf.training.optim import muon
from gpt_kit_hf.training.optim.optimizer import create_optimizer

STEPS, HOWS = 3, ("ddp", "fsdp2", "hybrid")


class Orthogonalised:
    """Counts the matrices that this process orthogonalises."""

    def __init__(self) -> None:
        self.count, self.whole = 0, muon.orthogonalised

    def __call__(self, matrices: Tensor, *arguments: Any) -> Tensor:
        self.count += len(matrices)
        return self.whole(matrices, *arguments)


def trained(world: int, how: str) -> dict[str, Any]:
    """Take some steps with Muon; return all weights and momentums, whole, and the matrices orthogonalised here."""
    model = tiny_model()
    if how in ("fsdp2", "hybrid"):
        sizes = (world,) if how == "fsdp2" else (2, world // 2)  # replicas, and shards of each
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer: Any = create_optimizer(model, NORMUON)
    if how == "ddp":
        optimizer.replicas = groups.WORLD
    muon.orthogonalised = counted = Orthogonalised()
    reference = tiny_model()
    for step in range(STEPS):
        give_gradients(reference, step)
        for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
            gradient = other.grad
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
    muon.orthogonalised = counted.whole
    found: dict[str, Any] = {"count": counted.count}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key, tensor in {"weight": parameter, **state}.items():
            assert isinstance(tensor, DTensor) == isinstance(parameter, DTensor) or tensor.dim() == 0
            found[f"{key} of {name}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
    return found


def trained_in_each_way(rank: int, world: int) -> dict[str, Any]:
    return {how: trained(world, how) for how in HOWS}


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_divide_the_matrices_and_end_with_the_same_weights(world: int, tmp_path: Path) -> None:
    alone = trained(1, "alone")
    matrices = alone.pop("count")
    found = run_ranks(trained_in_each_way, world, tmp_path)
    for how in HOWS:
        sharing = world // 2 if how == "hybrid" else world
        counts = [rank[how].pop("count") for rank in found]
        assert sum(counts) == matrices * world // sharing, how  # each matrix once
        assert max(counts) == STEPS * sum(-(-matrices // sharing) for matrices in (8, 2, 2)), how  # of each shape
        for rank in found:
            assert rank[how].keys() == alone.keys()
            for name, tensor in alone.items():
                torch.testing.assert_close(rank[how][name], tensor, rtol=0, atol=1e-6, msg=f"{how}: {name}")
                assert torch.equal(rank[how][name], found[0][how][name]), name  # or the processes drift apart
