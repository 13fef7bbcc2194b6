"""Work before training that may take hours: processes divide it, and wait for each other without a time limit."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from gpt_kit_hf.errors import GPTKitError

T = TypeVar("T")

# Training's own collectives fail after minutes, so that a process that hangs ends the run. A text may take days.
_PATIENCE = timedelta(days=30)


class Preparation:
    """The processes of a run before training; made by `prepare_together`."""

    def __init__(self, accelerator: Accelerator, group: dist.ProcessGroup | None) -> None:
        self.accelerator, self.group = accelerator, group

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.accelerator.num_processes
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run(self, work: Callable[[], T], *, here: bool = True) -> list[T | None]:
        """Run `work` in the processes where `here` is true; return what it returned, by rank, once all are done.

        If it raises a GPTKitError in one process, that one raises it, and the others exit.
        """
        value: T | None = None
        failure: GPTKitError | None = None
        try:
            value = work() if here else None
        except GPTKitError as error:
            failure = error
        outcomes = self.gather((value, failure is not None))
        failed = [rank for rank, (_, has_failed) in enumerate(outcomes) if has_failed]
        if failed:  # one process reports it
            raise failure if failure is not None and self._rank == failed[0] else SystemExit(1)
        return [value for value, _ in outcomes]

    def on_main(self, work: Callable[[], T]) -> T:
        """Return in every process what `work` returns in the main one."""
        return self.run(work, here=self.accelerator.is_main_process)[0]  # type: ignore[return-value]

    def sharing(self, folder: Path) -> list[int]:
        """Return the ranks of the processes that see the same folder as this one: on its machine, or on all."""
        name = f".run-{self.gather(secrets.token_hex(8))[0]}-"
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{name}{self._rank}"
        own.touch()
        try:
            self.gather(None)
            found = [rank for rank in range(self.accelerator.num_processes) if (folder / f"{name}{rank}").exists()]
            self.gather(None)
        finally:
            own.unlink(missing_ok=True)
        return found

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)


@contextmanager
def prepare_together(accelerator: Accelerator) -> Iterator[Preparation]:
    """Give the processes a group of their own for the time before training."""
    if accelerator.num_processes == 1:
        yield Preparation(accelerator, None)
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    yield Preparation(accelerator, group)
    dist.destroy_process_group(group)
