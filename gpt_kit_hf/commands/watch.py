"""`gpt-kit watch` and `report`."""

from __future__ import annotations

import os
from pathlib import Path

from gpt_kit_hf.commands.running import note, quiet_libraries, write
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.http_server import check_packages
from gpt_kit_hf.options.evaluation import ReportOptions, WatchOptions
from gpt_kit_hf.storage.run_history import find_runs

_MARK = b'<meta name="generator" content="gpt-kit report">'
_NICENESS = 10  # a run on the same cores goes first


def watch(options: WatchOptions) -> None:
    """Show the curves of runs on a page of this machine, until interrupted."""
    check_packages("the page", "play")
    from gpt_kit_hf.pages.server import serve_page
    from gpt_kit_hf.pages.watch import watch_app

    for run in options.runs:
        if not find_runs(Path(run)):
            write(f"waiting for {'a run in ' if Path(run).exists() else ''}{run}\n")
    if os.name == "posix":
        os.nice(_NICENESS)
    serve_page(
        watch_app([Path(run) for run in options.runs]),
        "gpt-kit watch",
        port=options.port,
        open_browser=options.open,
        announce=lambda line: write(f"{line}\n"),
    )


def report(options: ReportOptions) -> None:
    """Write the report of a run."""
    check_packages("the report", "play")
    file = _report_file(options)
    from gpt_kit_hf.pages.report import write_report  # slow to import

    quiet_libraries()
    write_report(
        Path(options.run),
        file,
        text_files=options.text_files,
        tokens=options.tokens,
        device=options.device,
        announce=note,
    )
    write(f"{file}\n")


def _report_file(options: ReportOptions) -> Path:
    """Return the file to write. Raises UsageError if another file than a report is there."""
    file = Path(options.run, "report.html") if options.file is None else Path(options.file)
    if file.is_dir():
        raise UsageError(f"file {str(file)!r} is a folder")
    if not file.parent.is_dir():
        raise UsageError(f"file {str(file)!r}: its folder does not exist")
    if os.path.lexists(file):
        with file.open("rb") as found:
            if _MARK not in found.read(4096):
                raise UsageError(f"file {str(file)!r} exists and is no report; nothing is overwritten")
    return file
