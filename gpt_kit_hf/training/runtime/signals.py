"""SIGTERM, SIGINT and SIGHUP as a wish to stop, which a run grants between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# What a process ends with that was asked to stop, and saved: sysexits.h has it for "try again later".
EXIT_STOPPED = 75

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class StopSignals:
    """Takes the signals that end a process, as a context manager; what handled them before does so again after it.

    Inside `granted_between_steps` a signal is only noted, to be asked for; a second SIGINT raises KeyboardInterrupt
    there, as every signal does outside. With `launcher`, the process that started this one, its end counts as a signal
    too: a launcher that is killed takes nobody with it. In a thread other than the main one, where Python has no
    signals, only the launcher is watched. A signal that was ignored, as SIGHUP under nohup, stays ignored.
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
            # None: it was set by other means than Python's, and cannot be named here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def granted_between_steps(self) -> Iterator[None]:
        """Note signals instead of ending what is under way."""
        self._noted_only = True
        try:
            yield
        finally:
            self._noted_only = False

    def asked(self) -> bool:
        """Return whether somebody asked this process to stop."""
        if not self._reason and self._launcher is not None and os.getppid() != self._launcher:
            self._reason = "the end of its launcher"
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """What asked: "SIGTERM", for example; empty where only another process of the run was asked."""
        return self._reason

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked loader of batches: a terminal tells all, and the run ends its loaders itself
        again = bool(self._reason)
        self._reason = signal.Signals(number).name
        if not self._noted_only or (again and number == signal.SIGINT):
            raise KeyboardInterrupt(self._reason)
