"""The one thread that computes for all requests of a page."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from gpt_kit_hf.errors import StoppedError

# Returns true as soon as a result is not wanted any more.
Stop: TypeAlias = Callable[[], bool]

_Result = TypeVar("_Result")


class Work:
    """Computes one thing after another, in a thread: models need no locks, and the server answers meanwhile."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="page")
        self._numbers, self._newest = itertools.count(), dict[str, int]()
        self._is_ended = False

    async def run(self, line: str, compute: Callable[[Stop], _Result]) -> _Result:
        """Return what `compute` returns.

        Of the requests of a line only the newest is wanted: it stops one that waits, or that is computed and asks its
        `Stop`. Raises StoppedError for a request that was stopped.
        """
        number = self._newest[line] = next(self._numbers)

        def is_stopped() -> bool:
            return self._is_ended or self._newest[line] != number

        def job() -> _Result:
            if is_stopped():
                raise StoppedError("a newer request replaced this one")
            return compute(is_stopped)

        return await asyncio.get_running_loop().run_in_executor(self._pool, job)

    def end(self) -> None:
        """Stop all that waits and all that asks whether it is stopped."""
        self._is_ended = True
        self._pool.shutdown(wait=False, cancel_futures=True)
