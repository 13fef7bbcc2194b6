"""A command line of gpt-kit in this process, and what came of it."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from gpt_kit_hf.commands.main import main


class Ended(NamedTuple):
    """The exit code of a command, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


def gpt_kit(*arguments: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())
