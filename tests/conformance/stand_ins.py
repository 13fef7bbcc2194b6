"""What transformers' common tests import and its source distribution leaves out.

The distribution holds the files of `tests/` but not its subfolders. The two mixins stand empty: generation and export
are not tested by this run. The helpers work: they start the ranks of the parallelism tests, on the CPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# File of `tests/` that may be missing, and what is taken from it.
MISSING = {
    "exporters/test_export.py": ["ExportTesterMixin"],
    "generation/test_utils.py": ["GenerationTesterMixin"],
    "utils/test_configuration_utils.py": ["config_common_kwargs"],
    "distributed_testing_utils.py": [
        "_get_distributed_backend",
        "_get_distributed_device_type",
        "_get_rank_device",
        "_set_rank_device",
        "_start_rank_processes",
        "run_distributed",
    ],
}

# One value other than the default for the fields that every configuration inherits.
config_common_kwargs = {
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["SomeModel"],
    "id2label": {0: "no", 1: "perhaps", 2: "yes"},
    "label2id": {"no": 0, "perhaps": 1, "yes": 2},
    "problem_type": "multi_label_classification",
}


class ExportTesterMixin:
    """Empty; `ModelTesterMixin` is built on it."""


class GenerationTesterMixin:
    """Empty; the common tests ask that the class of a generating model is built on it."""


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """A CPU rank has no device to select."""


def _start_rank_processes(fn: Callable[..., object], args: tuple[Any, ...], nprocs: int) -> None:
    """Run fn(rank, *args) in one process a rank; raise where one fails."""
    torch.multiprocessing.spawn(fn, args=args, nprocs=nprocs)


def run_distributed(world_size: int) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Return a decorator: the decorated fn(*args) runs fn(rank, *args) on every rank of a process group."""

    def on_all_ranks(fn: Callable[..., object]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                meeting_point = str(Path(folder) / "rendezvous")
                _start_rank_processes(_run_rank, args=(fn, world_size, meeting_point, args), nprocs=world_size)

        return run

    return on_all_ranks


def _run_rank(rank: int, fn: Callable[..., object], world_size: int, meeting_point: str, args: tuple[Any]) -> None:
    # transformers reads these even where a process group exists.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.FileStore(meeting_point, world_size)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    try:
        fn(rank, *args)
    finally:
        dist.destroy_process_group()
