"""All options of a pretraining run: its own, and those of the rooms it passes through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_type_hints

from gpt_kit_hf.data.text.corpus import EncodingOptions
from gpt_kit_hf.data.text.sources import TextOptions
from gpt_kit_hf.data.text.windows import WindowOptions
from gpt_kit_hf.errors import CheckpointError, UsageError, unknown_name
from gpt_kit_hf.model.presets import ModelOptions
from gpt_kit_hf.training.optim.optimizer import OptimizerOptions

T = TypeVar("T")


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a run goes: its length, batches, precision, and when it evaluates, saves and speaks."""

    output_dir: str = dataclasses.field(metadata={"help": "folder of the run, such as runs/mine"})
    resume: bool = _option(False, "continue the run in output_dir, or begin it if there is none")
    overwrite: bool = _option(False, "begin anew; a run in output_dir is moved aside, not deleted")
    batch_size: int = _option(32, "sequences of a step, over all processes and micro-batches")
    micro_batch_size: int | None = _option(None, "sequences that a process computes at once, if not all of its share")
    max_steps: int | None = _option(None, "steps to train, instead of epochs")
    epochs: float | None = _option(None, "passes over the training text, if not 1")
    mixed_precision: str = _option("auto", "auto, fp32, bf16 or fp16; auto is bf16 where the device computes in it")
    compile: bool | None = _option(
        None, "compile the model's blocks (torch.compile), a slow start and then faster steps; if not said, on a GPU"
    )
    seed: int = _option(0, "seed of the first weights, the order, dropout and the held-out documents")
    cpu: bool = _option(False, "train on the CPU even if there is a GPU")
    eval_every: int = _option(250, "steps between evaluations")
    eval_windows: int = _option(128, "held-out windows of an evaluation; the last one scores all")
    save_every: int = _option(500, "steps between checkpoints")
    keep_last: int = _option(2, "checkpoints to keep")
    keep_best: int = _option(0, "checkpoints to keep besides, by held-out loss; each save is then scored")
    background_save: bool = _option(True, "write checkpoints while training goes on, where there is memory for a copy")
    log_every: int = _option(50, "steps between progress lines and tracker entries")
    sample_every: int = _option(500, "steps between text samples; 0 for none")
    sample_prompt: str = _option("", "text that samples continue")
    sample_tokens: int = _option(80, "tokens of a sample")
    report_to: list[str] = dataclasses.field(
        default_factory=lambda: ["auto"],
        metadata={"help": "trackers: none, auto (TensorBoard if installed), or names that Accelerate knows"},
    )
    num_workers: int = _option(0, "processes that load batches; the windows are views, so 0 is fast")
    max_skipped: int = _option(20, "updates in a row that may be skipped, non-finite or spikes, before the run stops")
    spike_factor: float = _option(
        0.0, "skip an update whose gradient norm is above so many times the median of the last 100; 0 for none"
    )
    out_of_memory: Literal["halve", "stop"] = _option(
        "halve", "when a step runs out of memory: halve the micro-batch (not on several processes), or stop"
    )
    activation_checkpointing: bool = _option(
        False, "compute activations again in the backward pass: less memory, slower steps, the same updates"
    )
    allow_changes: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "options that may differ when the run is resumed: learning_rate, max_steps and the like"},
    )

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise UsageError(f"max_steps={self.max_steps} and epochs={self.epochs}: give one of them")
        if self.epochs is not None and not 0.0 < self.epochs < math.inf:
            raise UsageError(f"epochs must be positive and finite, got {self.epochs}")
        positive = ("batch_size", "micro_batch_size", "max_steps", "eval_every", "eval_windows", "save_every")
        for name in (*positive, "keep_last", "log_every", "sample_tokens", "max_skipped"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.seed >= 2**63:
            raise UsageError(f"seed must be below 2**63, got {self.seed}")
        if self.spike_factor and not 1.0 < self.spike_factor < math.inf:
            raise UsageError(f"spike_factor must be above 1 and finite, or 0 for none, got {self.spike_factor}")
        if self.out_of_memory not in ("halve", "stop"):
            raise UsageError(unknown_name("out_of_memory", self.out_of_memory, ("halve", "stop")))
        for name in ("seed", "sample_every", "num_workers", "keep_best"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be at least 0, got {getattr(self, name)}")


# What may change when a run continues: where it speaks and saves, and how a batch is cut, never what is computed.
FREE_ON_RESUME = frozenset(
    {"training." + name for name in ("output_dir", "resume", "overwrite", "micro_batch_size", "save_every")}
    | {"training." + name for name in ("eval_every", "eval_windows", "keep_last", "log_every", "report_to")}
    | {"training." + name for name in ("sample_every", "sample_prompt", "sample_tokens", "num_workers")}
    | {"training." + name for name in ("max_skipped", "keep_best", "background_save", "out_of_memory")}
    | {"training.activation_checkpointing", "training.allow_changes", "text.num_proc"}
)
# What may change besides, if the user names it: the batches stay the same, the numbers do not.
_CHANGEABLE = frozenset(
    {"training." + name for name in ("max_steps", "epochs", "mixed_precision", "compile", "cpu", "spike_factor")}
    | {"optimizer." + field.name for field in dataclasses.fields(OptimizerOptions) if field.name != "optimizer"}
)


class OptionsOfRun(Protocol):
    """What every kind of run is asked for, among other things."""

    @property
    def training(self) -> TrainingOptions:
        """How the run goes."""

    @property
    def optimizer(self) -> OptimizerOptions:
        """How the weights move."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """All options of a run, by the room that reads them."""

    training: TrainingOptions
    text: TextOptions
    encoding: EncodingOptions = dataclasses.field(default_factory=EncodingOptions)
    windows: WindowOptions = dataclasses.field(default_factory=WindowOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)


def flat_options(options: Any) -> dict[str, Any]:
    """Return the options of a run, a dataclass of rooms, as "room.name": value."""
    rooms = dataclasses.asdict(options)
    return {f"{room}.{name}": value for room, values in rooms.items() for name, value in values.items()}


def stored_options(kind: type[T], stored: Mapping[str, Any]) -> T:
    """Return the options that `flat_options` made flat; `kind` is their class.

    Raises CheckpointError for what another version has written, or a stranger.
    """
    rooms: dict[str, dict[str, Any]] = {}
    for name, value in stored.items():
        room, _, option = name.partition(".")
        rooms.setdefault(room, {})[option] = value
    hints = get_type_hints(kind)
    try:
        return kind(**{room: hints[room](**values) for room, values in rooms.items()})
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"these are not the options of a run of this version: {error}") from error


def changed_options(stored: Mapping[str, Any], options: OptionsOfRun, run: Path) -> dict[str, list[Any]]:
    """Return {option: [before, now]} of what differs from a run's own options, `stored` by `flat_options`.

    Raises UsageError, with all that differs and what to do, unless every change is free or named in allow_changes.
    """
    # An option that came into being after the run began was at its default.
    before, given = {**_defaults(options), **stored}, flat_options(options)
    names, missing = sorted(before.keys() | given.keys()), object()
    changed = {
        name: [before.get(name), given.get(name)]
        for name in names
        if before.get(name, missing) != given.get(name, missing)
    }
    fixed = changed.keys() - FREE_ON_RESUME - _allowed(options.training.allow_changes or ())
    if fixed:
        listed = "; ".join(f"{name} was {changed[name][0]!r}, is {changed[name][1]!r}" for name in sorted(fixed))
        way = "name another output_dir"
        if fixed <= _CHANGEABLE:
            way = f"allow it by --allow_changes {' '.join(sorted(name.split('.')[1] for name in fixed))}"
        raise UsageError(f"cannot resume {str(run)!r} with other options ({listed}): give them as they were, or {way}")
    return changed


def _defaults(options: Any) -> dict[str, Any]:
    """Return the defaults of options, flat, of those that have one."""
    found: dict[str, Any] = {}
    for room in dataclasses.fields(options):
        for option in dataclasses.fields(getattr(options, room.name)):
            if option.default is not dataclasses.MISSING:
                found[f"{room.name}.{option.name}"] = option.default
    return found


def _allowed(names: Sequence[str]) -> set[str]:
    """Return the options, "room.name", that a user's list of names lets change."""
    known = {option.split(".")[1]: option for option in _CHANGEABLE}
    for name in names:
        if name not in known:
            raise UsageError(f"allow_changes: {unknown_name('changeable option', name, sorted(known))}")
    return {known[name] for name in names}
