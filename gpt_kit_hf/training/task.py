"""What a run works on, as the loop sees it: a model, samples in an order, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from gpt_kit_hf.data.order import BatchPlan, Order, PlannedBatches
from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.training.console import Console
from gpt_kit_hf.training.runtime.signals import StopSignals


@dataclass(frozen=True, kw_only=True)
class RunSetting:
    """What is there before the data is read: the processes, where the run lies, and the checkpoint it continues."""

    options: TrainingOptions
    accelerator: Accelerator
    console: Console
    folder: Path
    checkpoint: Path | None
    stop: StopSignals


class RunTask(Protocol):
    """A model and what it is trained on and scored by."""

    scored: str  # what the held-out samples are called
    scored_first: bool  # whether the score before the first step tells something
    model: PreTrainedModel
    fingerprint: str
    order: Order
    tokens_per_sample: float

    def batches(self, plan: BatchPlan, first_step: int, last_step: int, position: Any) -> Iterator[Batch]:
        """Yield this process's micro-batches; `position` is the one stored by the step before `first_step`."""

    def position(self) -> Any:
        """Return what `batches` needs besides the step to go on from here, as JSON; every process calls."""

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score held-out samples, all if there is no maximum; every process calls.

        Raises StoppedError where any process was asked to stop meanwhile.
        """

    def sample(self) -> str:
        """Return text that shows what the model does, in lines; the main process calls."""

    def describe(self) -> list[str]:
        """Return lines that say what the model and the data are."""

    def facts(self) -> dict[str, Any]:
        """Return what the run's record keeps of model and data, as JSON."""

    def baselines(self) -> Mapping[str, float]:
        """Return what is easily reached on the held-out text, in bits per byte, by name."""

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write what `from_pretrained` loads, with these weights, and what continues from there.

        Called from another thread while the model trains: nothing that a step reads may change.
        """

    def publish(self, run: Path, checkpoint: Path) -> None:
        """Put the finished model into the run's root."""

    def next_command(self, run: Path) -> list[str]:
        """Return the command to try next."""


def map_batches(
    dataset: Dataset[Any],
    collate: Callable[[Sequence[Any]], Batch],
    plan: BatchPlan,
    steps: tuple[int, int],
    setting: RunSetting,
) -> Iterator[Batch]:
    """Yield the planned micro-batches of the steps first..last-1 from a dataset that is read by number."""
    return iter(
        DataLoader(
            dataset,
            batch_sampler=PlannedBatches(plan, *steps),
            collate_fn=collate,
            num_workers=setting.options.dataloader_num_workers,
            pin_memory=setting.accelerator.device.type == "cuda",
            # Without its own generator a loader draws a seed from the global one.
            generator=torch.Generator().manual_seed(setting.options.seed),
        )
    )
