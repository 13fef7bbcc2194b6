"""How a command ends: its exit code, one line for an error, and its output."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpt_kit_hf.errors import GPTKitError, StoppedError, UsageError, one_line
from gpt_kit_hf.options.run import OptionsOfRun
from gpt_kit_hf.text import printable
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
OUTPUT_CLOSED = 141  # as a program that SIGPIPE ends


def escape_what_cannot_be_shown() -> None:
    r"""Make the output streams write characters that their encoding lacks as escapes, such as \u2588."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise UsageError for an argument that is not in the encoding of this process, which libraries cannot use."""
    if sys.getfilesystemencoding() != "utf-8":
        for argument in arguments:
            if any("\udc80" <= character <= "\udcff" for character in argument):
                raise UsageError(_not_encoded(argument))


def _not_encoded(name: str) -> str:
    return f"{name!r} is not in this process's encoding, {sys.getfilesystemencoding()}: set PYTHONUTF8=1"


def run_command(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; an expected error is one line on stderr, not a traceback."""
    _open_missing_streams()
    quiet_libraries()
    try:
        command()
    except UsageError as error:
        return _fail(error, USAGE_ERROR)
    except StoppedError as error:
        return _fail(error, EXIT_STOPPED)
    except (GPTKitError, OSError) as error:
        return _fail(error, FAILURE)
    except UnicodeEncodeError as error:  # a file that was found, not named, which a library cannot open
        if sys.getfilesystemencoding() == "utf-8":
            raise
        return _fail(_not_encoded(error.object), USAGE_ERROR)
    except KeyboardInterrupt as error:
        if str(error) in ("", "SIGINT"):
            return _fail("interrupted", INTERRUPTED)
        # A scheduler, which starts the run again: it had not begun, so there was nothing to save.
        return _fail(f"stopped by {error} before the first step", EXIT_STOPPED)
    return 0


def _open_missing_streams() -> None:
    """Write to nowhere where the process was started without an output stream, as by `>&-`: Python has None there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"error: {one_line(error)}\n")
    return code


def quiet_libraries() -> None:
    """Turn off the progress bars of the libraries that are loaded: they would break the lines of a run."""
    if (datasets := sys.modules.get("datasets")) is not None and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if (logging := sys.modules.get("transformers.utils.logging")) is not None:
        logging.disable_progress_bar()


def announce_loading(options: OptionsOfRun) -> None:
    """Write the first line of a run, in its main process: the imports take seconds."""
    # RANK is set by torch's launchers. What is loaded already needs no line.
    if os.environ.get("RANK", "0") == "0" and "torch" not in sys.modules:
        Console(sys.stdout, options.training.log_format).log("loading  PyTorch and transformers")


@contextmanager
def to_output() -> Iterator[None]:
    """Flush what is written to the standard output; if its reader is gone, as after `| head`, end without a word."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it at its end
        raise SystemExit(OUTPUT_CLOSED) from None


def write(text: str) -> None:
    """Write to the standard output, without control characters if it is a terminal."""
    with to_output():
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)


def note(text: str) -> None:
    """Write a line for a person to the standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
