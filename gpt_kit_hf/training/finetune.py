"""Finetuning on instruction rows, in full or by LoRA."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM

from gpt_kit_hf.data.instructions.batches import PackedRows, PaddedRows
from gpt_kit_hf.data.instructions.formats import FormatFn
from gpt_kit_hf.data.instructions.reader import SkippedRows, read_rows
from gpt_kit_hf.data.instructions.report import report_of
from gpt_kit_hf.data.instructions.templates import as_prompted, with_template
from gpt_kit_hf.data.instructions.tokenized import SupervisedRows, encode_rows
from gpt_kit_hf.data.order import BatchPlan, ShuffledOrder
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation, evaluate_batches, tokenizer_byte_lengths
from gpt_kit_hf.hub.base_model import BaseModel
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import KEEP, RowOptions, SupervisionOptions
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.options.run import FinetuneOptions
from gpt_kit_hf.storage.atomic_files import save_json
from gpt_kit_hf.storage.run_folder import ADAPTER_FOLDER, REPORT_FILE, publish_in_run
from gpt_kit_hf.text import short
from gpt_kit_hf.training.log.run_log import RunResult
from gpt_kit_hf.training.loop import run_training
from gpt_kit_hf.training.lora import add_adapter, load_adapter, replace_adapter
from gpt_kit_hf.training.needs.cost import first_rows
from gpt_kit_hf.training.state.sharded_state import gathered, replace_weights, unsharded_model
from gpt_kit_hf.training.task import RunContext, Sample, Task, check_max_length, generate_sample

_STEPS_AVERAGED = 32  # whose batches show how long an average one is
# Matrix products of a block, and about how many sizes the loss is computed in, one by the number of trained tokens.
_PRODUCTS, _LOSSES = 4, 20


def finetune(
    options: FinetuneOptions, *, format_fn: FormatFn | None = None, stream: TextIO | None = sys.stdout
) -> RunResult:
    """Finetune a model on instruction rows, or resume to; progress is written to `stream`.

    What is trained is shown first and stored in supervision.json. The run folder then holds the model for
    `from_pretrained`; a LoRA adapter is merged into it, and lies beside it in adapter/. `format_fn` writes a row's
    text instead of the known formats. Raises what `run_training` raises, and DataError for rows that cannot be used or
    would train nothing.
    """
    return run_training(options, lambda context: InstructionTask(options, context, format_fn), stream=stream)


class InstructionTask(Task):
    """A pretrained model, or a LoRA adapter on it, and the instruction rows that it is trained on."""

    eval_name = "eval answers"
    eval_before_training = True

    def __init__(self, options: FinetuneOptions, context: RunContext, format_fn: FormatFn | None) -> None:
        self.options, self.context = options, context
        self._lora, self._named = options.adapter.lora_r > 0, options.base.model_name_or_path
        context.console.log(f"loading  {self._named}")
        self.saves_trained_only = self._lora
        self.base = BaseModel(
            self._named, context.folder, context.checkpoint, dropout=options.base.dropout, adapter=self._lora
        )
        self.tokenizer, self.model = self.base.tokenizer, self._with_adapter(self.base.model)
        check_max_length(self.model, options.supervision.max_length)
        context.console.log("reading  the rows")
        train, self.eval_rows = self._read_rows(format_fn)
        self.report = report_of(train, self.tokenizer, eval_rows=self.eval_rows)
        self.report.check()
        rows = PackedRows(train) if options.supervision.packing else PaddedRows(train)
        self.dataset: PackedRows | PaddedRows = rows
        self.collate = rows.collate
        self.order = ShuffledOrder(samples=len(rows), seed=context.options.seed)
        self.tokens_per_sample = int((train.lengths - 1).sum()) / len(rows)  # what the model reads
        self.fingerprint = f"{train.fingerprint()}-{self.eval_rows.fingerprint()}"
        if self._lora:  # an adapter must not be resumed on another base
            self.fingerprint += f"-{self.base.digest}"
        self.byte_lengths = tokenizer_byte_lengths(self.tokenizer, self.model.config.vocab_size)

    def longest_rows(self, count: int) -> Batch:
        """Return the longest rows or sequences, again if there are fewer."""
        longest = np.argsort(-self.dataset.lengths)
        return self.collate([self.dataset[index] for index in np.resize(longest, count).tolist()])

    def typical_rows(self, plan: BatchPlan, step: int, count: int) -> Batch:
        """Return rows of the micro-batch that comes closest to the average length of many."""
        planned = _planned(plan, step)
        lengths = np.array([self.dataset.batch_length(ids) for ids in planned])
        nearest = int(np.abs(lengths - lengths.mean()).argmin())
        batch = self.collate([self.dataset[index] for index in planned[nearest]])
        return first_rows(batch, count)

    def ids_evaluated(self, max_samples: int | None, batch_size: int) -> int:
        """Return the number of ids in the padded batches."""
        return sum(rows * length for rows, length in self._evaluated(max_samples, batch_size))

    def more_kernels(self, plan: BatchPlan) -> int:
        """Return those for other sizes of batches: products forward and, where they are trained, two backward.

        Products of attention, of adapters, and of a base that is not a GPT-Kit model are not told apart.
        """
        trained = {(len(ids), self.dataset.batch_length(ids)) for ids in _planned(plan, 0)}
        evaluated = set(self._evaluated(self.context.options.max_eval_samples, plan.micro_batch_size)) - trained
        return 3 * _PRODUCTS * (len(trained) - 1) + _PRODUCTS * len(evaluated) + 3 * _LOSSES

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score the answers of the evaluation rows."""
        rows, accelerator, stop = PaddedRows(self.eval_rows), self.context.accelerator, self.context.stop.asked
        own = Subset(rows, range(len(rows))[:max_samples][accelerator.process_index :: accelerator.num_processes])
        batches = DataLoader(own, batch_size=batch_size, collate_fn=rows.collate, generator=torch.Generator())
        return evaluate_batches(
            self.model, batches, self.byte_lengths, accelerator=accelerator, autocast=autocast, stop=stop
        )

    def sample(self) -> Sample:
        """Return the first evaluation prompt with the model's answer."""
        row = self.eval_rows[0]
        with gathered(self.model):  # PEFT's `generate` calls the model inside of it
            return generate_sample(
                self.model,
                torch.from_numpy(row.input_ids[: int(row.trained.argmax())])[None],
                self.context.options.sample_max_new_tokens,
                lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
                eos_token_id=self.tokenizer.eos_token_id,
            )

    def describe(self) -> list[str]:
        """Return the supervision report and a line with the model's size."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        how = f"LoRA of rank {self.options.adapter.lora_r}" if self._lora else "in full"
        return [
            *self.report.text(color=self.context.console.color).splitlines(),
            f"model     {self._named}: {short(self.model.num_parameters())} parameters, "
            f"{short(trained)} of them trained ({how})",
        ]

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about base model and rows."""
        return {
            **self.base.facts(),
            "supervision": self.report.to_dict(),
            "eval_rows": len(self.eval_rows),
        }

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the model, or the adapter alone, with the tokenizer and the report."""
        self._write(self.model, folder, weights)

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the weights of a checkpoint, or the adapter's; every process calls."""
        if self._lora:
            replace_adapter(self.model, checkpoint)
            return
        replace_weights(
            self.model,
            lambda: AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict(),
        )

    def publish(self, run: Path, checkpoint: Path) -> None:
        """Copy the finished model into the run's root folder: merged, with the adapter beside it, for LoRA."""
        if not self._lora:
            publish_in_run(run, checkpoint)
            return
        # On a fresh base in host memory: a device may not hold the model twice, and a sharded one is not whole.
        adapted = load_adapter(self.base.load(), checkpoint)
        (run / ADAPTER_FOLDER).mkdir(exist_ok=True)
        adapted.save_pretrained(str(run / ADAPTER_FOLDER))
        with tempfile.TemporaryDirectory(dir=run, prefix=".merged-") as stage:
            self._write(adapted.merge_and_unload(), Path(stage))
            publish_in_run(run, Path(stage))

    def next_command(self, run: Path) -> list[str]:
        """Return the command that chats with the model."""
        return ["gpt-kit", "chat", str(run)]

    # --- batches

    def _evaluated(self, max_samples: int | None, batch_size: int) -> list[tuple[int, int]]:
        """Return rows and length of each batch of the evaluation."""
        rows = PaddedRows(self.eval_rows)
        indices = range(len(rows))[:max_samples]
        batches = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
        return [(len(batch), rows.batch_length(batch)) for batch in batches]

    # --- preparation

    def _with_adapter(self, model: Any) -> Any:
        if not self._lora:
            return model
        if self.context.checkpoint is not None:
            return load_adapter(model, self.context.checkpoint)
        torch.manual_seed(self.context.options.seed)
        return add_adapter(model, self.options.adapter)

    def _read_rows(self, format_fn: FormatFn | None) -> tuple[SupervisedRows, SupervisedRows]:
        """Return the training rows and the evaluation rows, of which only the answers are scored."""
        base, options, supervision = self.options.base, self.options.rows, self.options.supervision
        everything = supervision.train_on == "everything"
        answers = dataclasses.replace(supervision, train_on="answers") if everything else supervision
        rows = self._encode(options, supervision, format_fn)
        if base.eval_rows is not None:
            files = [find_files(options.rows or [], "rows"), find_files(base.eval_rows, "eval_rows")]
            shared = set.intersection(*({file.resolve() for file in found} for found in files))
            if shared:
                raise UsageError(f"eval_rows: {min(shared)} is trained on as well; evaluate on a file of its own")
            apart = dataclasses.replace(
                options, rows=base.eval_rows, dataset_name=None, dataset_config=None, dataset_train_split=None
            )
            return rows, self._encode(apart, answers, format_fn)
        shares, seed = [1.0 - base.eval_fraction, base.eval_fraction], self.context.options.seed
        train, eval_rows = rows.split(shares, seed)
        if everything:
            _, eval_rows = self._encode(options, answers, format_fn).split(shares, seed)
        return train, eval_rows

    def _encode(
        self, options: RowOptions, supervision: SupervisionOptions, format_fn: FormatFn | None
    ) -> SupervisedRows:
        skipped = SkippedRows()
        rows = read_rows(options, skipped)
        if format_fn is None and options is not self.options.rows:  # the template is that of the training rows
            rows = as_prompted(rows, self.tokenizer, supervision.format)
        elif format_fn is None:
            # A checkpoint's own template is what its run was trained with.
            choice = KEEP if self.context.checkpoint else self.options.base.chat_template
            rows = with_template(rows, self.tokenizer, choice, supervision.format)
        return encode_rows(
            rows,
            self.tokenizer,
            supervision,
            format_fn,
            vocab_size=self.model.config.vocab_size,
            on_bad_row=options.on_bad_row,
            skipped=skipped,
            unknown_keys=options.unknown_keys,
            text_rows=self.options.supervision.train_on == "everything",
        )

    def _write(self, model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        eos = self.tokenizer.eos_token_id
        defaults = model.generation_config
        defaults.eos_token_id = eos
        # Padding has an id in generation only, where the attention mask hides it.
        defaults.pad_token_id = eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        unsharded_model(model).save_pretrained(str(folder), state_dict=weights)
        self.tokenizer.save_pretrained(str(folder))
        save_json(folder / REPORT_FILE, self.report.to_dict())


def _planned(plan: BatchPlan, step: int) -> list[list[int]]:
    """Return the rows of the micro-batches of some steps from this one on."""
    return [ids for number in range(step, step + _STEPS_AVERAGED) for ids in plan.micro_batches(number)]
