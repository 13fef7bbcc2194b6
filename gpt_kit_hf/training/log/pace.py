"""How fast a run trains, and how much memory it has used at most."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_RECENT = 20  # steps


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The speed since the last measurement, and this session so far.

    `tokens_per_second` counts trained tokens and the time of the steps alone; `seconds` is the time since the first
    step, with evaluations and saves; `memory_bytes` is the peak, see `peak_memory`.
    """

    tokens_per_second: float
    seconds: float
    memory_bytes: int


class Pace:
    """Measures steps; the first one, which compiles and allocates, counts only until there is a second."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        self._measured = (0.0, 0)  # seconds and tokens at the last measurement
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)

    def add(self, seconds: float, tokens: int) -> None:
        """Count a step that trained so many tokens."""
        if self._steps == 1:
            self._seconds, self._tokens = 0.0, 0
            self._measured = (0.0, 0)
            self._recent.clear()
        self._steps += 1
        self._recent.append((seconds, tokens))
        self._seconds += seconds
        self._tokens += tokens

    @property
    def seconds_per_step(self) -> float:
        """The mean so far."""
        return self._seconds / max(1, self._steps - 1)

    @property
    def tokens_per_second(self) -> float:
        """The mean of the last steps, 0 before the first."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / seconds if seconds else 0.0

    def measure(self, device: torch.device) -> Speed:
        """Return the speed since the last measurement."""
        seconds, tokens = self._seconds - self._measured[0], self._tokens - self._measured[1]
        self._measured = (self._seconds, self._tokens)
        return Speed(
            tokens_per_second=tokens / seconds if seconds else 0.0,
            seconds=time.perf_counter() - self._began,
            memory_bytes=peak_memory(device),
        )


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far of torch's tensors on a GPU, of this process's resident memory on a CPU."""
    if device.type == "mps":  # keeps no peak
        return int(torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    if (most := _most_held()) is not None:
        return most
    try:
        import resource
    except ImportError:  # on Windows, whose system keeps the peak itself
        found = psutil.Process().memory_info()._asdict()
        return int(found.get("peak_wset", found["rss"]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _most_held() -> int | None:
    """Return the peak of this process's memory by Linux, None elsewhere: its ru_maxrss may be that of the parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
