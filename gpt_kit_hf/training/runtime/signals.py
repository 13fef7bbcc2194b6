"""SIGTERM, SIGINT and SIGHUP as requests to stop, which a run follows between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# Exit status of a run that saved and stopped on request: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_STOPPED = 75

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class StopSignals:
    """Context manager that handles the signals that end a process, and restores the handlers of before.

    Inside `stop_between_steps` a signal is only recorded, for `asked`; a second SIGINT raises KeyboardInterrupt
    there, as every signal does outside. With `launcher`, the pid of the parent, the end of that process counts as a
    request, too, as a launcher that is killed does not end its children. Outside of the main thread, where Python
    handles no signals, only the launcher is watched. A signal that was ignored, as SIGHUP under nohup, stays ignored.
    """

    def __init__(self, launcher: int | None = None) -> None:
        self._launcher, self._pid = launcher, os.getpid()
        self._reason = ""
        self._noted_only = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: the handler was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def stop_between_steps(self) -> Iterator[None]:
        """Record signals instead of raising KeyboardInterrupt."""
        self._noted_only = True
        try:
            yield
        finally:
            self._noted_only = False

    def asked(self) -> bool:
        """Return whether this process was requested to stop."""
        if not self._reason and self._launcher is not None and os.getppid() != self._launcher:
            self._reason = "the end of its launcher"
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """The origin of the request, as "SIGTERM"; empty if only another process of the run received one."""
        return self._reason

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked DataLoader worker: a terminal signals all processes, and the run ends its workers itself
        again = bool(self._reason)
        self._reason = signal.Signals(number).name
        if not self._noted_only or (again and number == signal.SIGINT):
            raise KeyboardInterrupt(self._reason)
