"""Pretraining on text: from options to a model folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import ConcatDataset

from gpt_kit_hf import tokenization
from gpt_kit_hf.corpus import Corpus, choose_encoding, prepare_corpus
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.evaluation import (
    Evaluation,
    evaluate_stream,
    gzip_bits_per_byte,
    token_byte_lengths,
    unigram_bits_per_byte,
)
from gpt_kit_hf.generation import generate_text_autoregressive
from gpt_kit_hf.losses import Batch
from gpt_kit_hf.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.pretraining_data import TokenWindows, collate_windows
from gpt_kit_hf.progress import printable, short
from gpt_kit_hf.run_folder import publish_in_run, write_model_folder
from gpt_kit_hf.run_options import RunOptions
from gpt_kit_hf.run_record import RunResult
from gpt_kit_hf.run_task import RunSetting, map_batches
from gpt_kit_hf.sample_order import BatchPlan, MixtureOrder, Order, ShuffledOrder
from gpt_kit_hf.tokenizer_twin import load_encoding
from gpt_kit_hf.training_run import run_training


def train(options: RunOptions, *, stream: TextIO | None = sys.stdout) -> RunResult:
    """Train a GPT on text as the options say, or continue to; progress goes to `stream`.

    The folder then holds the model as `from_pretrained` loads it, its checkpoints, metrics.jsonl, loss.png and
    run.json. Errors are those of `run_training`.
    """
    return run_training(options, lambda setting: PretrainingTask(options, setting), stream=stream)


class PretrainingTask:
    """A GPT and the windows of the corpus it is trained on."""

    def __init__(self, options: RunOptions, setting: RunSetting) -> None:
        self.options, self.setting = options, setting
        self._check_before_reading()
        self.corpus = self._prepare_corpus()
        self.fingerprint = self.corpus.fingerprint
        self.model = self._build_model()
        self.windows = [self._cut(stream) for stream in self.corpus.sources]
        self.order: Order = self._order()
        self.tokens_per_sample = float(options.windows.max_length)
        self._check_held_out()
        self.byte_lengths = token_byte_lengths(self.corpus.encoding)

    def batches(self, plan: BatchPlan, first_step: int, last_step: int, position: Any) -> Iterator[Batch]:
        """Yield this process's micro-batches."""
        windows = self.windows[0] if len(self.windows) == 1 else ConcatDataset(self.windows)
        return map_batches(windows, collate_windows, plan, (first_step, last_step), self.setting)

    def position(self) -> None:
        """Return None: the step says it all."""

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score the held-out text, each token once."""
        windows = self.options.windows
        return evaluate_stream(
            self.model,  # not the wrapped one: processes may have unequally many windows
            self.corpus.held_out,
            self.byte_lengths,
            max_length=windows.max_length,
            stride=windows.max_length,
            packing=windows.packing,
            batch_size=batch_size,
            max_windows=max_samples,
            accelerator=self.setting.accelerator,
            autocast=autocast,
        )

    def sample(self) -> str:
        """Return text that the model continues from the sample prompt, or from the start of a document."""
        chosen, encoding = self.setting.options, self.corpus.encoding
        end = encoding.encode_single_token(tokenization.END_OF_TEXT)
        prompt = torch.tensor([[end, *encoding.encode_ordinary(chosen.sample_prompt)]])
        room = self.model.config.max_position_embeddings - prompt.shape[1]
        if room < 1:
            return ""
        if not self.model(prompt.to(self.model.device)).logits.isfinite().all():
            return "(no sample: the model's scores are not finite)"
        ids = generate_text_autoregressive(
            self.model, prompt, min(room, chosen.sample_tokens), temperature=0.8, top_k=50
        )
        return printable(encoding.decode([token for token in ids[0].tolist() if token != end]))

    def describe(self) -> list[str]:
        """Return lines that say what the model and the text are."""
        corpus, config = self.corpus, self.model.config
        lines = [
            f"text     {corpus.documents:,} documents, {len(corpus.train):,} tokens to train on, "
            f"{len(corpus.held_out):,} held out ({corpus.encoding.name}, {corpus.encoding.n_vocab:,} tokens)"
        ]
        if isinstance(self.order, MixtureOrder):
            named = zip(self.options.text.mixture or [], self.order.quotas, self.corpus.sources, strict=True)
            total = sum(self.order.quotas)
            lines += [f"mixture  {quota / total:.1%} {name}: {len(part):,} tokens" for name, quota, part in named]
        return [
            *lines,
            f"model    {self.options.model.model}: {short(self.model.num_parameters())} parameters, "
            f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide",
        ]

    def facts(self) -> dict[str, Any]:
        """Return what the record keeps of the text."""
        return {
            "documents": self.corpus.documents,
            "train_tokens": len(self.corpus.train),
            "held_out_tokens": len(self.corpus.held_out),
            "tokenizer_fingerprint": tokenization.fingerprint(self.corpus.encoding),
        }

    def baselines(self) -> Mapping[str, float]:
        """Return what gzip and the frequencies of bytes reach on the held-out text."""
        encoding, held_out = self.corpus.encoding, self.corpus.held_out
        counts = [stream.counts(encoding.n_vocab) for stream in (self.corpus.train, held_out)]
        return {
            "gzip -9": gzip_bits_per_byte(held_out, encoding),
            "byte unigram": unigram_bits_per_byte(counts[0], counts[1], encoding),
        }

    def write_model(self, folder: Path) -> None:
        """Write what `from_pretrained` loads."""
        write_model_folder(folder, self.model, self.corpus.encoding)

    def publish(self, run: Path, checkpoint: Path) -> None:
        """Put the finished model into the run's root."""
        publish_in_run(run, checkpoint)

    def next_command(self, run: Path) -> list[str]:
        """Return the command that continues a text."""
        return ["gpt-kit", "generate", str(run), "--prompt", self.setting.options.sample_prompt or "The"]

    # --- preparation

    def _check_before_reading(self) -> None:
        config = self.options.model.build(vocab_size=self.options.encoding.vocab_size)
        max_length = self.options.windows.max_length
        if max_length > config.max_position_embeddings:
            raise UsageError(
                f"max_length={max_length} is above the position table, "
                f"max_position_embeddings={config.max_position_embeddings}: raise that, or lower max_length"
            )

    def _prepare_corpus(self) -> Corpus:
        """Read and tokenise on one process of a machine first; the others find what it stored."""
        accelerator, checkpoint = self.setting.accelerator, self.setting.checkpoint
        chosen: list[Any] = [None]
        if accelerator.is_main_process:
            if checkpoint is not None:
                chosen = [load_encoding(checkpoint)]
            else:
                chosen = [choose_encoding(self.options.text, self.options.encoding)]
        encoding = broadcast_object_list(chosen)[0]
        with accelerator.local_main_process_first():
            return prepare_corpus(self.options.text, encoding, seed=self.setting.options.seed)

    def _build_model(self) -> GPTKitForCausalLM:
        encoding = self.corpus.encoding
        end = encoding.encode_single_token(tokenization.END_OF_TEXT)
        config = self.options.model.build(
            vocab_size=encoding.n_vocab,
            bos_token_id=end,
            eos_token_id=end,
            tokenizer_fingerprint=tokenization.fingerprint(encoding),
        )
        if self.setting.checkpoint is not None:
            kept: GPTKitForCausalLM = GPTKitForCausalLM.from_pretrained(self.setting.checkpoint, dtype=torch.float32)
            return kept
        torch.manual_seed(self.setting.options.seed)
        return GPTKitForCausalLM(config)

    def _cut(self, stream: Any) -> TokenWindows:
        options = self.options.windows
        return TokenWindows(stream, options.max_length, options.step, packing=options.packing)

    def _order(self) -> Order:
        seed = self.setting.options.seed
        if len(self.windows) == 1:
            return ShuffledOrder(samples=len(self.windows[0]), seed=seed)
        return MixtureOrder(sizes=tuple(map(len, self.windows)), weights=self.corpus.weights, seed=seed)

    def _check_held_out(self) -> None:
        tokens, window = len(self.corpus.held_out), self.options.windows.max_length + 1
        if tokens < window:
            raise DataError(
                f"the held-out text has {tokens} tokens, fewer than one window of max_length + 1 = {window}: "
                "raise eval_fraction, give eval_files, or lower max_length"
            )
