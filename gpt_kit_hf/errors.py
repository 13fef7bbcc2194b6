"""The exceptions of the package, and two helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GPTKitError(Exception):
    """Base of every exception that this package raises on purpose."""


class UsageError(GPTKitError, ValueError):
    """Wrong use: the message names the argument, its value and the rule that it breaks."""


class DataError(UsageError):
    """A text, row or token that cannot be used: the message names the file and, if there is one, the line."""


class CheckpointError(GPTKitError):
    """A checkpoint or run folder that is missing, incomplete, changed or in use by another process."""


class NonFiniteError(GPTKitError):
    """Logits from which no token can be chosen, or too many non-finite losses or gradients in a row.

    In a run, the weights are those before the first of them.
    """


class RunError(GPTKitError):
    """A run that cannot continue: one of its processes ended, or a step needs more memory than there is."""


class HubError(GPTKitError):
    """An upload or download that failed or gave wrong content."""


class StoppedError(GPTKitError):
    """A run that was stopped on request between two steps; the message says what is saved."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return "unknown <kind> '<name>'; did you mean ...?", or the list of known names if none is similar."""
    names = {spelling.lower(): spelling for spelling in known}
    near = [repr(names[match]) for match in difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.55)]
    if near:
        return f"unknown {kind} {name!r}; did you mean {' or '.join(near)}?"
    return f"unknown {kind} {name!r}; known: {', '.join(names.values())}"


def one_line(error: object) -> str:
    """Return the message of an error, or any text, with each run of white space as one space."""
    return " ".join(str(error).split())
