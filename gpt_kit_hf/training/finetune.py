"""Instruction tuning: from a pretrained model and rows to a model that answers, in full or by LoRA."""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf.data.instructions.dataset import FormatFn
from gpt_kit_hf.data.instructions.reader import PlacedRow, SkippedRows, read_rows
from gpt_kit_hf.data.instructions.report import SupervisionReport, report_of
from gpt_kit_hf.data.instructions.templates import with_template
from gpt_kit_hf.data.instructions.tokenized import PackedRows, PaddedRows, SupervisedRows, encode_rows
from gpt_kit_hf.data.order import BatchPlan, Order, ShuffledOrder
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.evaluation.metrics import Evaluation, evaluate_batches, tokenizer_byte_lengths
from gpt_kit_hf.generation.generate import context_length, generate_text_autoregressive
from gpt_kit_hf.hub.model_folder import find_base, find_model_folder, load_part, weights_digest
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import KEEP, RowOptions, SupervisionOptions
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.options.run import FinetuneOptions
from gpt_kit_hf.storage.atomic_files import load_json, save_json
from gpt_kit_hf.storage.run_folder import ADAPTER_FOLDER, RECORD_FILE, REPORT_FILE, publish_in_run
from gpt_kit_hf.text import printable, short
from gpt_kit_hf.tokenization.encodings import get_encoding, save_tokenizer
from gpt_kit_hf.training.loop import run_training
from gpt_kit_hf.training.lora import add_adapter, load_adapter, merged
from gpt_kit_hf.training.run_log import RunResult
from gpt_kit_hf.training.state.sharded_state import uncut_model
from gpt_kit_hf.training.task import RunSetting, map_batches


def finetune(
    options: FinetuneOptions, *, format_fn: FormatFn | None = None, stream: TextIO | None = sys.stdout
) -> RunResult:
    """Tune a model on instruction rows as the options say, or continue to; progress goes to `stream`.

    What is trained is shown first, and stands in supervision.json. The folder then holds the model as
    `from_pretrained` loads it, merged if an adapter was trained, which also lies in adapter/. `format_fn` writes a
    row's text instead of the formats known. Errors are those of `run_training`, and DataError for rows that cannot be
    used or would train nothing.
    """
    return run_training(options, lambda setting: InstructionTask(options, setting, format_fn), stream=stream)


def inspect_rows(
    rows: RowOptions, supervision: SupervisionOptions, *, model: str | None = None, examples: int = 3
) -> SupervisionReport:
    """Return what of the rows would be trained, by the tokenizer of a model; without one tokens are bytes.

    Raises DataError for rows that cannot be used, UsageError for a model that cannot be loaded.
    """
    vocab_size = None
    if model is None:
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(get_encoding("bytes"), folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        place = find_model_folder(model)
        tokenizer, vocab_size = load_part(AutoTokenizer, place, model), load_part(AutoConfig, place, model).vocab_size
    skipped = SkippedRows()
    encoded = encode_rows(
        with_template(read_rows(rows, skipped), tokenizer, KEEP, supervision.format),
        tokenizer,
        supervision,
        vocab_size=vocab_size,
        on_bad_row=rows.on_bad_row,
        skipped=skipped,
    )
    return report_of(encoded, tokenizer, n_examples=examples)


class InstructionTask:
    """A pretrained model and the rows that it is tuned on."""

    scored = "held-out answers"
    scored_first = True

    def __init__(self, options: FinetuneOptions, setting: RunSetting, format_fn: FormatFn | None) -> None:
        self.options, self.setting = options, setting
        # A run that goes on in full does not need its base any more.
        needs_base = setting.checkpoint is None or options.adapter.lora_r > 0
        source = find_base(options.base.model_name_or_path, options.adapter) if needs_base else str(setting.checkpoint)
        self.tokenizer = load_part(AutoTokenizer, str(setting.checkpoint or source), options.base.model_name_or_path)
        self.model = self._load_model(source)
        self._check_length()
        train, self.held_out = self._read_rows(format_fn)
        self.report: SupervisionReport = report_of(train, self.tokenizer)
        self.report.check()
        self.dataset = PackedRows(train) if options.supervision.packing else PaddedRows(train)
        self.order: Order = ShuffledOrder(samples=len(self.dataset), seed=setting.options.seed)
        self.tokens_per_sample = len(train.ids) / len(self.dataset)
        self.fingerprint = f"{train.fingerprint()}-{self.held_out.fingerprint()}"
        self.base_commit = self._base_commit(needs_base)
        self.base_digest = None
        if options.adapter.lora_r:  # an adapter goes on with the base that it began with, or not at all
            self.base_digest = weights_digest(source, self.model.config)
            self.fingerprint += f"-{self.base_digest}"
        self.byte_lengths = tokenizer_byte_lengths(self.tokenizer, self.model.config.vocab_size)

    def batches(self, plan: BatchPlan, first_step: int, last_step: int, position: Any) -> Iterator[Batch]:
        """Yield this process's micro-batches."""
        return map_batches(self.dataset, self.dataset.collate, plan, (first_step, last_step), self.setting)

    def position(self) -> None:
        """Return None: the step says it all."""

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score the answers of held-out rows."""
        rows, accelerator = PaddedRows(self.held_out), self.setting.accelerator
        chosen = range(len(rows) if max_samples is None else min(max_samples, len(rows)))
        own = list(chosen)[accelerator.process_index :: accelerator.num_processes]
        loader = DataLoader(
            Subset(rows, own), batch_size=batch_size, collate_fn=rows.collate, generator=torch.Generator()
        )
        return evaluate_batches(
            self.model,
            loader,
            self.byte_lengths,
            accelerator=accelerator,
            autocast=autocast,
            stop=self.setting.stop.asked,
        )

    def sample(self) -> str:
        """Return what the model answers to the first held-out prompt."""
        row = self.held_out[0]
        prompt = row.input_ids[: int(row.trained.argmax())]
        room = (context_length(self.model) or sys.maxsize) - len(prompt)
        if not len(prompt) or room < 1:
            return ""
        ids = torch.from_numpy(prompt)[None]
        if not self.model(ids.to(self.model.device)).logits.isfinite().all():
            return "(no sample: the model's scores are not finite)"
        answered = generate_text_autoregressive(
            self.model,
            ids,
            min(room, self.setting.options.sample_max_new_tokens),
            eos_token_id=self.tokenizer.eos_token_id,
        )
        text: str = self.tokenizer.decode(answered[0], skip_special_tokens=True)
        return printable(text)

    def describe(self) -> list[str]:
        """Return the supervision report, and lines that say what the model is."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        how = f"LoRA of rank {self.options.adapter.lora_r}" if self.options.adapter.lora_r else "in full"
        return [
            *self.report.text(color=self.setting.console.interactive).splitlines(),
            f"held out  {len(self.held_out):,} rows",
            f"model     {self.options.base.model_name_or_path}: {short(self.model.num_parameters())} parameters, "
            f"{short(trained)} of them trained ({how})",
        ]

    def facts(self) -> dict[str, Any]:
        """Return what the record keeps of the rows."""
        return {
            "base_model": self.options.base.model_name_or_path,
            "base_commit": self.base_commit,
            "base_digest": self.base_digest,
            "supervision": self.report.to_dict(),
            "held_out_rows": len(self.held_out),
        }

    def baselines(self) -> dict[str, float]:
        """Return nothing: gzip does not answer."""
        return {}

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write the model, or the adapter alone, with the tokenizer and the report."""
        self._write(self.model, folder, weights)

    def publish(self, run: Path, checkpoint: Path) -> None:
        """Put the finished model into the run's root, an adapter merged into its base and beside it."""
        if not self.options.adapter.lora_r:
            publish_in_run(run, checkpoint)
            return
        with tempfile.TemporaryDirectory(dir=run, prefix=".merged-") as stage:
            self._write(merged(copy.deepcopy(self.model)), Path(stage))
            publish_in_run(run, Path(stage))
        (run / ADAPTER_FOLDER).mkdir(exist_ok=True)
        self.model.save_pretrained(str(run / ADAPTER_FOLDER))

    def next_command(self, run: Path) -> list[str]:
        """Return the command that talks to the model."""
        return ["gpt-kit", "chat", str(run)]

    # --- preparation

    def _load_model(self, source: str) -> Any:
        checkpoint, adapter = self.setting.checkpoint, self.options.adapter
        dropout = self.options.base.dropout
        # GPT-2's names and ours; a model that has them under others takes no such argument, and says so.
        asked = {} if dropout is None else dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
        if adapter.lora_r:
            base = load_part(
                AutoModelForCausalLM, source, self.options.base.model_name_or_path, dtype=torch.float32, **asked
            )
            if checkpoint is not None:
                return load_adapter(base, checkpoint)
            torch.manual_seed(self.setting.options.seed)
            return add_adapter(base, adapter)
        place = str(checkpoint or source)
        return load_part(
            AutoModelForCausalLM, place, self.options.base.model_name_or_path, dtype=torch.float32, **asked
        )

    def _base_commit(self, loaded: bool) -> str | None:
        """Return the commit on the Hub that the base is of, None for a folder's; a run that goes on recorded it."""
        if Path(self.options.base.model_name_or_path).exists():
            return None
        if loaded:
            return str(self.model.config._commit_hash)
        record = self.setting.folder / RECORD_FILE
        commit: str | None = load_json(record).get("base_commit") if record.is_file() else None
        return commit

    def _check_length(self) -> None:
        context, wanted = context_length(self.model), self.options.supervision.max_length
        if context is not None and wanted > context:
            raise UsageError(
                f"max_length={wanted} is above what the model reads, max_position_embeddings={context}: lower it"
            )

    def _read_rows(self, format_fn: FormatFn | None) -> tuple[SupervisedRows, SupervisedRows]:
        """Return the rows to train on and those held out, of which the answers are scored, whatever is trained."""
        base, supervision = self.options.base, self.options.supervision
        answers = dataclasses.replace(supervision, train_on="answers")
        rows = self._encode(self.options.rows, supervision, format_fn)
        if base.eval_rows is not None:
            named = self.options.rows.rows or []
            both = {f.resolve() for f in find_files(named, "rows")} & {
                f.resolve() for f in find_files(base.eval_rows, "eval_rows")
            }
            if both:
                raise UsageError(f"eval_rows: {min(both)} is trained on as well; hold out a file of its own")
            apart = RowOptions(rows=base.eval_rows, on_bad_row=self.options.rows.on_bad_row)
            return rows, self._encode(apart, answers, format_fn)
        shares, seed = [1.0 - base.eval_fraction, base.eval_fraction], self.setting.options.seed
        train, held_out = rows.split(shares, seed)
        if supervision.train_on == "everything":
            _, held_out = self._encode(self.options.rows, answers, format_fn).split(shares, seed)
        return train, held_out

    def _encode(
        self, options: RowOptions, supervision: SupervisionOptions, format_fn: FormatFn | None
    ) -> SupervisedRows:
        skipped = SkippedRows()
        return encode_rows(
            self._rows(options, skipped) if format_fn is None else read_rows(options, skipped),
            self.tokenizer,
            supervision,
            format_fn,
            vocab_size=self.model.config.vocab_size,
            on_bad_row=options.on_bad_row,
            skipped=skipped,
        )

    def _rows(self, options: RowOptions, skipped: SkippedRows) -> Iterator[PlacedRow]:
        chosen = self.options.base.chat_template
        return with_template(read_rows(options, skipped), self.tokenizer, chosen, self.options.supervision.format)

    def _write(self, model: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        end = self.tokenizer.eos_token_id
        defaults = model.generation_config
        defaults.eos_token_id = end
        # Padding has an id in generation only, where the attention mask hides it.
        defaults.pad_token_id = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        whole = uncut_model(model) if isinstance(model, FSDPModule) else model
        whole.save_pretrained(str(folder), state_dict=weights)
        self.tokenizer.save_pretrained(str(folder))
        save_json(folder / REPORT_FILE, self.report.to_dict())
