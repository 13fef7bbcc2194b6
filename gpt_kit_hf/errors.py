"""The one exception tree of the package, and the sentence that suggests a nearby name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GPTKitError(Exception):
    """Base of every exception that this package raises on purpose."""


class UsageError(GPTKitError, ValueError):
    """A mistake of the caller: the message names the argument, the value and the rule that it breaks."""


class DataError(UsageError):
    """A text, row or token that cannot be used: the message names the file and, where there is one, the line."""


class CheckpointError(GPTKitError):
    """A checkpoint or run folder that is missing, torn, altered or in use by another process."""


class NonFiniteError(GPTKitError):
    """Training met too many non-finite losses or gradients in a row; the weights are those before the first."""


class RunError(GPTKitError):
    """A run that cannot go on: one of its processes has ended, or a step needs more memory than there is."""


class HubError(GPTKitError):
    """What was to be sent to or fetched from the Hub was not, or is not what it should be; the message says why."""


class StoppedError(GPTKitError):
    """A run that was asked to stop, and did between two steps; the message says what is saved."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return "unknown <kind> '<name>'; did you mean ...?", or the list of known names if none is near."""
    names = {spelling.lower(): spelling for spelling in known}
    near = [repr(names[match]) for match in difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.55)]
    if near:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(near)}?"
    return f"unknown {kind} {name!r}; known: {', '.join(names.values())}"


def one_line(error: object) -> str:
    """Return an error's message, or any text, with its line breaks as spaces."""
    return " ".join(str(error).split())
