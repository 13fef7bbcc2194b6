"""The experiment trackers of a run: Accelerate's, each with the run's name, project and configuration."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    get_available_trackers,
)

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.storage.atomic_files import Report
from gpt_kit_hf.storage.run_folder import TENSORBOARD_FOLDER


def chosen_trackers(names: list[str]) -> list[str]:
    """Return the trackers for a `report_to` option. Raises UsageError for one that is not installed.

    "auto" is TensorBoard, if it is installed, as it writes into the run folder alone.
    """
    if names == ["none"]:
        return []
    if names == ["auto"]:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    installed = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise UsageError(f"report_to {name!r} is not installed: pip install {name}, or use auto or none")
    return names


class Trackers:
    """The trackers that the main process of a run writes to; the other processes have none."""

    def __init__(self, options: TrainingOptions, log: Report, *, main: bool) -> None:
        self._options, self._log = options, log
        self._names = chosen_trackers(options.report_to)
        self._main = main
        self._open: dict[str, GeneralTracker] = {}

    def start(self, run_id: str, configuration: Mapping[str, Any], done: int) -> None:
        """Begin the entries of a run, or continue them after the first `done` steps.

        Raises UsageError if a tracker cannot be started.
        """
        # Trackers take numbers, text and truth values.
        plain = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in configuration.items()}
        for name in self._names if self._main else ():
            tracker = self._tracker(name, run_id, done)
            try:
                with redirect_stdout(io.StringIO()):  # trackio's own lines would be between those of the run
                    tracker.start()
                    tracker.store_init_configuration(plain)
            except Exception as error:
                # Each raises errors of its own; nothing is trained yet.
                raise UsageError(f"report_to {name!r} cannot be started: {error}") from error
            self._open[name] = tracker
            self._log(f"tracker  {name}: {self._place(name)}")

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Write values; a tracker that fails is not written to any more, as that must not end the run."""
        named = {f"{group}/{name}": value for name, value in values.items()}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(named, step=step)
            except Exception as error:
                del self._open[name]
                self._log(f"the tracker {name} is no longer updated: {error}")

    def close(self) -> None:
        """Write what is buffered."""
        for name, tracker in self._open.items():
            try:
                with redirect_stdout(io.StringIO()):
                    _finish_trackio() if name == "trackio" else tracker.finish()
            except Exception as error:
                self._log(f"the tracker {name} was not closed: {error}")
        self._open = {}

    def _tracker(self, name: str, run_id: str, done: int) -> GeneralTracker:
        options = self._options
        project, run = options.project, run_name(options)
        if name == "tensorboard":
            # TensorBoard shows nothing of the steps that a resumed run computes again.
            return TensorBoardTracker(run, _tensorboard_folder(options), purge_step=done + 1 if done else None)
        if name == "trackio":
            return TrackioTracker(
                project,
                name=run,
                resume="allow" if done else "never",
                space_id=options.trackio_space_id,
                private=True,
                embed=False,  # no dashboard in a notebook, which Colab would share
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        if name == "wandb":
            return WandBTracker(project, name=run, id=run_id, resume="allow")
        kind = LOGGER_TYPE_TO_CLASS[name]
        return kind(project, options.output_dir) if kind.requires_logging_directory else kind(project)

    def _place(self, name: str) -> str:
        """Return where the entries are, and how to look at them."""
        options = self._options
        entry = f"project {options.project}, run {run_name(options)}"
        if name == "tensorboard":
            return f"{_tensorboard_folder(options)}; look at it by: tensorboard --logdir {options.output_dir}"
        if name != "trackio":
            return entry
        from trackio.utils import TRACKIO_DIR

        sent_to = (
            options.trackio_space_id or os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        )
        if sent_to:
            return f"{entry}, sent to {sent_to.partition('?')[0]}"
        return f"{entry}, on this machine, in {TRACKIO_DIR}; look at it by: trackio show --project {options.project}"


def _finish_trackio() -> None:
    """Finish the run for trackio itself: it would do so again when the process ends."""
    import trackio

    trackio.finish()


def run_name(options: TrainingOptions) -> str:
    """Return the name of a run in its trackers."""
    return options.run_name or Path(options.output_dir).resolve().name


def _tensorboard_folder(options: TrainingOptions) -> str:
    return str(Path(options.output_dir) / TENSORBOARD_FOLDER)
