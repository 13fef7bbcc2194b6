"""The page of `gpt-kit watch`: the curves of runs while they train, from their folders alone.

The page asks for what is new, with what it has; of metrics.jsonl only the new bytes are read. A run is asked for by a
number that this module gave it, so no request names a path.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gpt_kit_hf.errors import CheckpointError, one_line
from gpt_kit_hf.pages.curve_rows import curves
from gpt_kit_hf.pages.server import Asked, pages_app, read_request
from gpt_kit_hf.storage.run_history import RunHistory, RunReader, State, find_runs, read_state
from gpt_kit_hf.text import display_names

FILES = {
    "/": "watch/page.html",
    "/curve_math.js": "curve_math.js",
    "/curves.js": "curves.js",
    "/run_charts.js": "run_charts.js",
    "/curves.css": "curves.css",
    "/runs.css": "runs.css",
    "/watch.js": "watch/watch.js",
    "/watch.css": "watch/style.css",
}
_LOOK_AGAIN = 5.0  # seconds after which folders are searched for new runs, and runs that are not shown for their state
_RECORDED = ("documents", "train_tokens", "eval_tokens", "data_fingerprint", "precision", "device", "processes")
_Count: TypeAlias = Annotated[int, Field(ge=0)]


class SeenRun(Asked):
    """What the page has of a run that it shows; nothing counts if the version is another one."""

    version: str = ""
    about: str = ""
    train: _Count = 0
    eval: _Count = 0
    speed: _Count = 0
    samples: _Count = 0


class Seen(Asked):
    """The runs that the page shows, by id."""

    runs: dict[str, SeenRun]


class WatchedRuns:
    """The runs in the named folders, which may appear later; each folder is a run or holds runs."""

    def __init__(self, places: Sequence[Path]) -> None:
        self._places = list(places)
        self._readers: dict[Path, RunReader] = {}
        self._states: dict[Path, tuple[State, float]] = {}
        self._searched = -math.inf
        self._token = secrets.token_hex(4)  # a page that is left open when this program is started again begins anew
        self._lock = threading.Lock()  # one request at a time: readers keep their places

    def update(self, seen: Mapping[str, SeenRun]) -> dict[str, Any]:
        """Return all runs, with what is new of those that the page shows, and the folders without a run, as JSON."""
        with self._lock:
            self._search()
            names = display_names(self._readers)
            runs = []
            for number, (folder, reader) in enumerate(self._readers.items()):
                run: dict[str, Any] = {"id": str(number), "name": names[folder]}
                shown = seen.get(str(number))
                try:
                    run |= {"state": self._state(folder)} if shown is None else self._shown(reader, shown)
                except CheckpointError as error:
                    run |= {"state": "unreadable", "error": one_line(error)}
                runs.append(run)
            return {"runs": runs, "waiting": self._without_run()}

    def _search(self) -> None:
        now = time.monotonic()
        if now - self._searched < _LOOK_AGAIN and self._readers:
            return
        self._searched = now
        for place in self._places:
            for folder in find_runs(place):
                self._readers.setdefault(folder, RunReader(folder))

    def _without_run(self) -> list[str]:
        """Return the named folders in which no run has begun."""
        found = {place for folder in self._readers for place in (folder, *folder.parents)}
        return [str(place) for place in self._places if place not in found]

    def _state(self, folder: Path) -> State:
        """Return the state of a run that is not shown, as it was a few seconds ago."""
        state, read = self._states.get(folder, ("missing", -math.inf))
        if time.monotonic() - read > _LOOK_AGAIN:
            state = read_state(folder)
            self._states[folder] = state, time.monotonic()
        return state

    def _shown(self, reader: RunReader, seen: SeenRun) -> dict[str, Any]:
        run = reader.read()
        version = f"{self._token}-{reader.restarts}"
        if seen.version != version:
            seen = SeenRun(about=seen.about)
        about = about_run(run)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        new = [{"step": each.step, "prompt": each.prompt, "text": each.text} for each in run.samples[seen.samples :]]
        return {
            "version": version,
            "state": run.state,
            "error": run.error,
            "facts": run_facts(run),
            "curves": curves(run, {"train": seen.train, "eval": seen.eval, "speed": seen.speed}),
            "samples": {"from": min(seen.samples, len(run.samples)), "new": new},
            "about": {"digest": digest} | ({} if digest == seen.about else about),
        }


def watch_app(places: Sequence[Path]) -> ASGIApp:
    """Return the application of the page."""
    watched = WatchedRuns(places)

    async def update(request: Request) -> Response:
        seen = await read_request(request, Seen)
        return JSONResponse(await run_in_threadpool(watched.update, seen.runs))

    return pages_app(FILES, [Route("/update", update, methods=["POST"])])


def run_facts(run: RunHistory) -> dict[str, Any]:
    """Return what changes while the run trains, as JSON; null for what is not known."""
    per_step = run.trained_tokens / run.steps_done if run.steps_done else 0.0
    speed = run.series["tokens_per_second"].last
    left = None
    if run.state == "running" and run.steps_planned is not None and speed > 0:
        left = (run.steps_planned - run.steps_done) * per_step / speed
    best = None if run.best is None else {"step": run.best[0], "value": run.best[1]}
    last = {name: series.last for name, series in run.series.items()} | {"elapsed": run.elapsed.last}
    return {
        "step": run.steps_done,
        "planned": run.steps_planned,
        "trained_tokens": run.trained_tokens,
        "skipped": run.skipped,
        "left": left,
        "best": best,
        "checkpoints": list(run.checkpoints),
        "last": {name: value if math.isfinite(value) else None for name, value in last.items()},
    }


def about_run(run: RunHistory) -> dict[str, Any]:
    """Return what of a run changes rarely, as JSON: options, data, results, scores and how it was computed."""
    sessions = run.record.get("sessions")
    return {
        "options": dict(run.options),
        "parameters": run.record.get("parameters"),
        "recorded": {name: run.record[name] for name in _RECORDED if name in run.record},
        "sessions": len(sessions) if isinstance(sessions, list) else 0,
        "baselines": run.baselines,
        "bytes_per_token": run.bytes_per_token,
        "results": {name: value for name, value in run.results.items() if name != "beside_bits_per_byte"},
        "evaluations": [dict(each) for each in run.evaluations],
    }
