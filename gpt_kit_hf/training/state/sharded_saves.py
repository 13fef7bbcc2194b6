"""How the processes of a sharded run save together: the main one leads, the others follow."""

from __future__ import annotations

import platform
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.digests import FileDigest
from gpt_kit_hf.training.state.sharded_state import ShardedOptimizer, write_sharded_optimizer

# How long a process waits for another one that writes. One that has ended is noticed at once.
_TIMEOUT = timedelta(hours=2)


class ShardedSaves:
    """Connects the processes for their saves; every process creates one.

    They talk in a gloo group of their own, so that threads can save while the training's group computes. `lead` and
    `end` are for the main process, `follow` for the others; `on_this_host` is the number of processes here.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, platform.node(), group=self._group)
        self.on_this_host = hosts.count(platform.node())

    def all_agree(self, own: bool) -> bool:
        """Return whether `own` is true in all processes."""
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, own, group=self._group)
        return all(answers)

    def lead(self, folder: Path, state: ShardedOptimizer) -> dict[str, FileDigest]:
        """Announce the folder, and write to it with all processes; see `write_sharded_optimizer`."""
        self._tell(folder)
        return write_sharded_optimizer(folder, state, self._group)

    def end(self, written: bool) -> None:
        """Let the others go on, after the checkpoint was written or not."""
        self._tell(written)

    def follow(self, state: ShardedOptimizer) -> None:
        """Write to the folders that the main process announces; raise CheckpointError if its save fails."""
        while isinstance(told := self._tell(None), Path):
            with suppress(CheckpointError):  # the main process has it, too
                write_sharded_optimizer(told, state, self._group)
        if not told:
            raise CheckpointError("the main process did not write the checkpoint")

    def _tell(self, what: Path | bool | None) -> Path | bool:
        """Return in all processes what the main one tells."""
        told: list[Any] = [what]
        dist.broadcast_object_list(told, src=0, group=self._group)
        answer: Path | bool = told[0]
        return answer
