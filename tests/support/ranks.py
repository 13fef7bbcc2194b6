"""Processes of one gloo group, which run a function of a test module together.

They are forked from a server that has imported torch and the trainer once, so a group costs little more than its work.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "accelerate", "transformers", "gpt_kit_hf.training.steps"])
SECONDS = 300


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Return what `function(rank, world, *arguments)` returns in each process; fail with the tracebacks."""
    folder.mkdir(parents=True, exist_ok=True)
    started = [
        _SERVER.Process(target=_run_rank, args=(function, rank, world, folder, arguments), daemon=True)
        for rank in range(world)
    ]
    deadline = time.monotonic() + SECONDS
    try:
        for process in started:
            process.start()
        while any(process.is_alive() for process in started) and not any(process.exitcode for process in started):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        failures = [file.read_text() for file in sorted(folder.glob("failed-*.txt"))]
        assert not failures, "\n".join(failures)
        assert not any(process.exitcode for process in started), [process.exitcode for process in started]
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]


def _run_rank(function: Callable[..., Any], rank: int, world: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    # As torchrun sets them: Accelerate reads these.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = function(rank, world, *arguments)
        torch.save(found, folder / f"rank-{rank}.pt")
        if dist.is_initialized():  # a run ends it
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (folder / f"failed-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # at once: the others may not answer
