"""All options of a pretraining run: its own, and those of the rooms it passes through."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gpt_kit_hf.corpus import EncodingOptions
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.optimization import OptimizerOptions
from gpt_kit_hf.presets import ModelOptions
from gpt_kit_hf.pretraining_data import WindowOptions
from gpt_kit_hf.text_sources import TextOptions


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
    compile: bool = _option(False, "compile the model (torch.compile): a slow start, faster steps")
    seed: int = _option(0, "seed of the first weights, the order, dropout and the held-out documents")
    cpu: bool = _option(False, "train on the CPU even if there is a GPU")
    eval_every: int = _option(250, "steps between evaluations")
    eval_windows: int = _option(128, "held-out windows of an evaluation; the last one scores all")
    save_every: int = _option(500, "steps between checkpoints")
    keep_last: int = _option(2, "checkpoints to keep")
    log_every: int = _option(50, "steps between progress lines and tracker entries")
    sample_every: int = _option(500, "steps between text samples; 0 for none")
    sample_prompt: str = _option("", "text that samples continue")
    sample_tokens: int = _option(80, "tokens of a sample")
    report_to: list[str] = dataclasses.field(
        default_factory=lambda: ["auto"],
        metadata={"help": "trackers: none, auto (TensorBoard if installed), or names that Accelerate knows"},
    )
    num_workers: int = _option(0, "processes that load batches; the windows are views, so 0 is fast")
    max_skipped: int = _option(20, "updates in a row that may be skipped, non-finite, before the run stops")

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
        for name in ("seed", "sample_every", "num_workers"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be at least 0, got {getattr(self, name)}")


# What may change when a run continues: where it speaks and saves, and how a batch is cut, never what is computed.
FREE_ON_RESUME = frozenset(
    {"training." + name for name in ("output_dir", "resume", "overwrite", "micro_batch_size", "save_every")}
    | {"training." + name for name in ("eval_every", "eval_windows", "keep_last", "log_every", "report_to")}
    | {"training." + name for name in ("sample_every", "sample_prompt", "sample_tokens", "num_workers")}
    | {"training.max_skipped", "text.num_proc"}
)


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
