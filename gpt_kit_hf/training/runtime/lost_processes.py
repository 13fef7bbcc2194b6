"""Errors that mean that another process of the run has ended, and the line that the run ends with."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt_kit_hf.errors import RunError
from gpt_kit_hf.storage.checkpoints import list_checkpoints


def lost_process(error: RuntimeError) -> str | None:
    """Return a line if the error means that another process of the run has ended, else None.

    NCCL and the rendezvous raise subclasses of DistError. gloo and the DataLoader raise plain RuntimeErrors, which
    only their texts tell from others: "[.../gloo/transport/tcp/pair.cc:534] Connection closed by peer ..." and
    "DataLoader worker (pid 7) is killed by signal: Killed."
    """
    text = str(error).strip()
    first = text.splitlines()[0][:160] if text else ""
    if text.startswith("DataLoader worker"):
        return f"a process that loads batches ended ({first})"
    if isinstance(error, torch.distributed.DistError) or "gloo" in text.lower():
        return f"another process of the run does not answer ({first})"
    return None


def lost_run(reason: str, run: Path) -> RunError:
    """Return the error of a run that lost a process: the reason, the last checkpoint, and how to continue."""
    checkpoints = list_checkpoints(run)
    last = f"the last checkpoint is {checkpoints[-1].name}" if checkpoints else "there is no checkpoint yet"
    return RunError(f"{reason}; {last}: continue with --resume")
