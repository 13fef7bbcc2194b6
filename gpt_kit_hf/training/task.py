"""What the loop trains, behind one interface: the task with its model and data, and the context it is built in."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from gpt_kit_hf.data.order import BatchPlan, Order, PlannedBatches
from gpt_kit_hf.errors import GPTKitError, UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation
from gpt_kit_hf.generation.generate import context_length, generate_text_autoregressive
from gpt_kit_hf.model.losses import Batch, evaluation_mode
from gpt_kit_hf.options.run import OptionsOfRun
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.storage.remote_run import RemoteRun
from gpt_kit_hf.storage.run_folder import publish_in_run
from gpt_kit_hf.text import printable
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.runtime.signals import StopSignals

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What is known before the data is read: options, processes, folder, and the checkpoint to resume from.

    `remote` is the copy of the run that the main process keeps.
    """

    options: TrainingOptions
    accelerator: Accelerator
    console: Console
    folder: Path
    checkpoint: Path | None
    stop: StopSignals
    remote: RemoteRun | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that the model generated: the prompt, and the whole text, which begins with it."""

    prompt: str
    text: str


def decide_on_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Return in every process what `decide()` returns on the main one; if it raises there, the others exit."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except GPTKitError as error:
            answer[1] = error
    value, failure = broadcast_object_list(answer)
    if failure is not None:
        raise failure if accelerator.is_main_process else SystemExit(1)  # one process reports it
    return value  # type: ignore[no-any-return]


def joined_position(position: Any) -> Any:
    """Return the position in the data that all processes have together, each a part of it; every process calls."""
    parts = gather_object([position])
    if not isinstance(position, dict):
        return position
    return {key: part[key] for part in parts for key in part}


class Task(ABC):
    """A model with the data that it is trained and evaluated on."""

    eval_name: str  # of the evaluation data, in log lines
    eval_before_training = False
    saves_trained_only = False  # as an adapter is saved without its base
    data_name: str | None = None  # by which allow_changes allows other data when the run is resumed, None for never
    context: RunContext
    model: PreTrainedModel
    fingerprint: str  # of the data
    order: Order
    tokens_per_sample: float
    dataset: Dataset[Any]  # read by sample id, unless the task overrides `batches`
    collate: Callable[[Sequence[Any]], Batch]

    def with_recipe(self, options: OptionsOfRun) -> OptionsOfRun:
        """Return the options of a new run with what its recipe sets by the data."""
        return options

    def batches(self, plan: BatchPlan, first_step: int, last_step: int, position: Any) -> Iterator[Batch]:
        """Yield this process's micro-batches of the steps first_step..last_step-1.

        `position` is what `joined_position` returned after the step before `first_step`.
        """
        return map_batches(self.dataset, self.collate, plan, (first_step, last_step), self.context)

    def position(self) -> Any:
        """Return what `batches` needs besides the step number to continue after what it has yielded, as JSON.

        A part of it, as a dictionary, if other processes have the rest: `joined_position` joins them.
        """
        return None

    @abstractmethod
    def longest_rows(self, count: int) -> Batch:
        """Return a batch of so many rows, as long as any that is trained on."""

    def typical_rows(self, plan: BatchPlan, step: int, count: int) -> Batch:
        """Return so many rows, as long as those of the average micro-batch of the plan from this step on."""
        return self.longest_rows(count)

    def more_kernels(self, plan: BatchPlan) -> int:
        """Return about how many kernels oneDNN makes on a CPU in bfloat16 for batches other than the longest."""
        return 0

    @abstractmethod
    def ids_evaluated(self, max_samples: int | None, batch_size: int) -> int:
        """Return how many ids an evaluation reads, in all processes, padding included."""

    @abstractmethod
    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score evaluation samples, all of them for None; every process calls.

        Raises StoppedError if any process is asked to stop meanwhile.
        """

    @abstractmethod
    def sample(self) -> Sample:
        """Return text that the model generates, for the log."""

    @abstractmethod
    def describe(self) -> list[str]:
        """Return log lines that describe the model and the data."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about model and data, as JSON."""

    def final_facts(self) -> dict[str, Any]:
        """Return the entries of run.json that are known after the last step, as JSON; every process calls."""
        return {}

    def baselines(self) -> Mapping[str, float]:
        """Return the bits per byte of simple methods on the evaluation text, by name."""
        return {}

    @abstractmethod
    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder for `from_pretrained`, with these weights.

        Called from another thread while the model trains: must not change anything that a step reads.
        """

    @abstractmethod
    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the weights of a checkpoint; every process calls."""

    def publish(self, run: Path, checkpoint: Path) -> None:
        """Copy the finished model into the run's root folder."""
        publish_in_run(run, checkpoint)

    @abstractmethod
    def next_command(self, run: Path) -> list[str]:
        """Return the command to suggest after the run."""


def check_max_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise UsageError if sequences of `max_length` tokens are longer than the model's context."""
    context = context_length(model)
    if context is not None and max_length > context:
        raise UsageError(
            f"max_length={max_length} is above the model's context, max_position_embeddings={context}: lower it"
        )


def map_batches(
    dataset: Dataset[Any],
    collate: Callable[[Sequence[Any]], Batch],
    plan: BatchPlan,
    steps: tuple[int, int],
    context: RunContext,
) -> Iterator[Batch]:
    """Yield the planned micro-batches of the steps first..last-1 from a dataset with random access."""
    return iter(
        DataLoader(
            dataset,
            batch_sampler=PlannedBatches(plan, *steps),
            collate_fn=collate,
            num_workers=context.options.dataloader_num_workers,
            pin_memory=context.accelerator.device.type == "cuda",
            # Without its own generator a loader draws a seed from torch's global one.
            generator=torch.Generator().manual_seed(context.options.seed),
        )
    )


def generate_sample(
    model: PreTrainedModel, prompt: Tensor, max_new_tokens: int, decode: Callable[[list[int]], str], **sampling: Any
) -> Sample:
    """Return the prompt (1, T) with the model's continuation, or a note if its logits are not finite.

    The text is "" for an empty prompt and for one that fills the context. `sampling` is passed to
    `generate_text_autoregressive`.
    """
    written = printable(decode(prompt[0].tolist()))
    left = (context_length(model) or sys.maxsize) - prompt.shape[1]
    if prompt.shape[1] == 0 or left < 1:
        return Sample(prompt=written, text="")
    with evaluation_mode(model):  # dropout would draw random numbers
        finite = bool(model(prompt.to(model.device)).logits.isfinite().all())
    if not finite:
        return Sample(prompt=written, text="(no sample: the model's logits are not finite)")
    ids = generate_text_autoregressive(model, prompt, min(left, max_new_tokens), **sampling)
    return Sample(prompt=written, text=printable(decode(ids[0].tolist())))
