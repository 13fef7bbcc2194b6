"""The report of a run: one HTML file with its configuration, data, curves, samples, scores and tokens.

The file needs no network, and its Content-Security-Policy allows only the style and script that it was written with:
text of a model cannot run. It has no date and no path, so the same run gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gpt_kit_hf.errors import UsageError, one_line
from gpt_kit_hf.evaluation.passages import Passage
from gpt_kit_hf.hub.card.facts import card_facts
from gpt_kit_hf.pages import report_facts
from gpt_kit_hf.pages.curve_rows import curves
from gpt_kit_hf.pages.report_tokens import held_out_passages, passage_view
from gpt_kit_hf.pages.server import STATIC_FOLDER
from gpt_kit_hf.pages.watch import about_run, run_facts
from gpt_kit_hf.storage.atomic_files import replace_file
from gpt_kit_hf.storage.run_history import RunHistory, read_run

_TEMPLATE = resources.files("gpt_kit_hf.pages").joinpath("report.html.jinja").read_text(encoding="utf-8")
_STYLES = ("runs.css", "curves.css", "report/style.css")
_SCRIPTS = ("curve_math.js", "curves.js", "run_charts.js", "report/report.js")
_SECTIONS = {
    "curves": "Curves",
    "samples": "Samples",
    "scores": "Scores",
    "tokens": "Tokens",
    "data": "Data",
    "configuration": "Configuration",
    "invariance": "Invariance",
    "use": "How to use it",
    "computing": "How it was computed",
}


def write_report(
    folder: Path,
    file: Path,
    *,
    text_files: list[str] | None,
    tokens: int,
    device: str,
    announce: Callable[[str], None],
) -> None:
    """Write the report of the run in a folder to a file, in whose place may be an older report.

    `text_files` name the text to show by token, by default the run's own held-out text; if that cannot be found or
    there is no model, the report says so, and `announce` receives the reason. Raises UsageError for a `text_files`
    that cannot be used, CheckpointError for a run that cannot be read.
    """
    run = read_run(folder)
    passages: list[Passage] = []
    reason = "no tokens were asked for"
    if tokens:
        try:
            passages = held_out_passages(run, text_files, tokens, device)
        except UsageError as error:
            if text_files:
                raise
            reason = one_line(error)
            more = "" if error.__cause__ is None else f" ({one_line(error.__cause__)})"
            announce(f"the report shows no tokens: {reason}{more}")
    replace_file(file, render_report(run, card_facts(folder), passages, no_passages=reason))


def render_report(run: RunHistory, facts: dict[str, Any], passages: list[Passage], *, no_passages: str) -> str:
    """Return the report as HTML; `facts` are those of `card_facts`."""
    style, script = (
        "\n".join((STATIC_FOLDER / name).read_text(encoding="utf-8") for name in names)
        for names in (_STYLES, _SCRIPTS)
    )
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = {name: title for name, title in _SECTIONS.items() if name != "samples" or run.samples}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    values = report_facts.values(run, facts) | passage_view(passages, no_passages)
    return (
        environment.from_string(_TEMPLATE)
        .render(
            policy=Markup(policy),
            style=Markup(style),
            script=Markup(script),
            curve_data=_curve_data(run, facts["name"]),
            contents=list(shown.items()),
            **values,
        )
        .lstrip()
    )


def _curve_data(run: RunHistory, name: str) -> Markup:
    """Return what run_charts.js draws, as JSON that cannot end its script element."""
    about = about_run(run)
    data = {
        "name": name,
        "curves": curves(run, {}),
        "facts": {"best": run_facts(run)["best"]},
        "about": {each: about[each] for each in ("baselines", "bytes_per_token")},
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _digest(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
