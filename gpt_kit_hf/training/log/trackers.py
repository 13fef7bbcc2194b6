"""The experiment trackers of a run."""

from __future__ import annotations

import importlib.util

from accelerate.tracking import get_available_trackers

from gpt_kit_hf.errors import UsageError


def trackers(names: list[str]) -> list[str]:
    """Return the trackers for a `report_to` option. Raises UsageError for one that is not installed."""
    if names == ["none"]:
        return []
    if names == ["auto"]:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise UsageError(f"report_to {name!r} is not installed: pip install {name}, or use auto or none")
    return names
