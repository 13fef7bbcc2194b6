"""Pretraining on text, stored or streamed: from options to a model folder."""

from __future__ import annotations

import hashlib
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import tiktoken
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import ConcatDataset

from gpt_kit_hf.data.order import BatchPlan, MixtureOrder, ShuffledOrder, StreamOrder
from gpt_kit_hf.data.text.corpus import Corpus, choose_encoding, prepare_corpus, prepare_eval
from gpt_kit_hf.data.text.sources import source_notes, train_sources
from gpt_kit_hf.data.text.streaming import StreamBatches, StreamShard, stream_shard_count
from gpt_kit_hf.data.text.windows import TokenStream, TokenWindows, collate_windows
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.evaluation.metrics import (
    Evaluation,
    evaluate_stream,
    gzip_bits_per_byte,
    token_byte_lengths,
    unigram_bits_per_byte,
)
from gpt_kit_hf.hub.model_folder import write_model_folder
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.data import TRAINED_BPE
from gpt_kit_hf.options.run import CHANGED_TEXT, RunOptions
from gpt_kit_hf.text import short
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.export import load_encoding
from gpt_kit_hf.training.loop import run_training
from gpt_kit_hf.training.run_log import RunResult
from gpt_kit_hf.training.state.sharded_state import unsharded_model
from gpt_kit_hf.training.task import RunContext, Task, decide_on_main, generate_sample


def train(options: RunOptions, *, stream: TextIO | None = sys.stdout) -> RunResult:
    """Pretrain a GPT on text, or resume to; progress is written to `stream`.

    The run folder then holds the model for `from_pretrained`, its checkpoints, metrics.jsonl, loss.png and run.json.
    Raises what `run_training` raises.
    """
    return run_training(options, lambda context: text_task(options, context), stream=stream)


def text_task(options: RunOptions, context: RunContext) -> TextTask:
    """Return the task for stored or streamed text, as the options say."""
    return StreamingTask(options, context) if options.text.streaming else PretrainingTask(options, context)


class TextTask(Task):
    """A GPT and its evaluation text; subclasses add the training text."""

    eval_name = "eval text"
    model: GPTKitForCausalLM

    def __init__(self, options: RunOptions, context: RunContext) -> None:
        self.options, self.context = options, context
        self.encoding = decide_on_main(context.accelerator, self._choose_encoding)
        self._eos = self.encoding.encode_single_token(encodings.EOS_TOKEN)
        # One process of a machine tokenises; the others read what it stored.
        with context.accelerator.local_main_process_first():
            self.eval_text = self._read_text()
        self._check_eval_text()
        self._eval_fingerprint = self.eval_text.fingerprint()
        self.byte_lengths = token_byte_lengths(self.encoding)
        self.tokens_per_sample = float(options.windows.max_length)
        self.model = self._build_model()

    @abstractmethod
    def _read_text(self) -> TokenStream:
        """Prepare the training text; return the evaluation text."""

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score the evaluation text, each token once."""
        max_length = self.options.windows.max_length
        return evaluate_stream(
            self.model,  # not the wrapped one: processes may have different numbers of windows
            self.eval_text,
            self.byte_lengths,
            end_of_text=self._eos,
            max_length=max_length,
            stride=max_length,
            batch_size=batch_size,
            max_tokens=None if max_samples is None else max_samples * max_length,
            accelerator=self.context.accelerator,
            autocast=autocast,
            stop=self.context.stop.asked,
        )

    def sample(self) -> str:
        """Return the model's continuation of the sample prompt, after an EOS."""
        chosen = self.context.options
        prompt = torch.tensor(
            [[self._eos, *encodings.encode_ordinary(self.encoding, chosen.sample_prompt, "sample_prompt")]]
        )
        return generate_sample(
            self.model,
            prompt,
            chosen.sample_max_new_tokens,
            lambda ids: self.encoding.decode([token for token in ids if token != self._eos]),
            temperature=0.8,
            top_k=50,
        )

    def describe_model(self) -> str:
        """Return a log line with the model's name and size."""
        config = self.model.config
        return (
            f"model    {self.options.model.model}: {short(self.model.num_parameters())} parameters, "
            f"{config.n_layer} layer{'s' * (config.n_layer != 1)}, {config.n_head} "
            f"head{'s' * (config.n_head != 1)}, {config.n_embd} wide"
        )

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about the text."""
        return {
            "eval_tokens": len(self.eval_text),
            "eval_fingerprint": self._eval_fingerprint,
            "tokenizer_fingerprint": encodings.fingerprint(self.encoding),
        }

    def baselines(self) -> dict[str, float]:
        """Return what gzip reaches on the evaluation text."""
        return {"gzip -9": gzip_bits_per_byte(self.eval_text, self.encoding)}

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder for `from_pretrained`."""
        write_model_folder(folder, unsharded_model(self.model), self.encoding, weights)

    def next_command(self, run: Path) -> list[str]:
        """Return the command that generates text."""
        return ["gpt-kit", "generate", str(run), "--prompt", self.context.options.sample_prompt or "The"]

    # --- preparation

    def _choose_encoding(self) -> tiktoken.Encoding:
        if self.context.checkpoint is not None:
            return load_encoding(self.context.checkpoint)
        if self.options.encoding.encoding == TRAINED_BPE:
            self.context.console.log(f"training a bpe of {self.options.encoding.vocab_size:,} tokens on the text")
        return choose_encoding(self.options.text, self.options.encoding)

    def _check_eval_text(self) -> None:
        tokens, window = len(self.eval_text), self.options.windows.max_length + 1
        if tokens < window:
            raise DataError(
                f"the evaluation text has {tokens} tokens, fewer than one window of max_length + 1 = {window}: "
                "raise eval_fraction, give eval_files, or lower max_length"
            )

    def _build_model(self) -> GPTKitForCausalLM:
        if self.context.checkpoint is not None:
            kept: GPTKitForCausalLM = GPTKitForCausalLM.from_pretrained(self.context.checkpoint, dtype=torch.float32)
            return kept
        config = build_config(
            self.options.model,
            vocab_size=self.encoding.n_vocab,
            bos_token_id=self._eos,
            eos_token_id=self._eos,
            tokenizer_fingerprint=encodings.fingerprint(self.encoding),
        )
        torch.manual_seed(self.context.options.seed)
        return GPTKitForCausalLM(config)


class PretrainingTask(TextTask):
    """A GPT trained on the windows of a stored corpus."""

    data_name = CHANGED_TEXT
    corpus: Corpus
    collate = staticmethod(collate_windows)

    def __init__(self, options: RunOptions, context: RunContext) -> None:
        super().__init__(options, context)
        seed = context.options.seed
        self.fingerprint = self.corpus.fingerprint
        if len(self.windows) == 1:
            self.dataset, self.order = self.windows[0], ShuffledOrder(samples=len(self.windows[0]), seed=seed)
        else:
            self.dataset = ConcatDataset(self.windows)
            self.order = MixtureOrder(sizes=tuple(map(len, self.windows)), weights=self.corpus.weights, seed=seed)

    def describe(self) -> list[str]:
        """Return log lines that describe the text, the mixture and the model."""
        corpus, order = self.corpus, self.order
        lines = [
            f"text     {corpus.documents:,} document{'s' * (corpus.documents != 1)}, "
            f"{len(corpus.train):,} training tokens, {len(self.eval_text):,} eval tokens "
            f"({corpus.encoding.name}, vocabulary of {corpus.encoding.n_vocab:,})",
            *(f"text     {note}" for note in source_notes(self.options.text)),
        ]
        if isinstance(order, MixtureOrder):
            named = zip(self.options.text.mixture or [], order.quotas, corpus.sources, strict=True)
            total = sum(order.quotas)
            lines += [f"mixture  {quota / total:.1%} {name}: {len(text):,} tokens" for name, quota, text in named]
        return [*lines, self.describe_model()]

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about the text."""
        return {"documents": self.corpus.documents, "train_tokens": len(self.corpus.train), **super().facts()}

    def baselines(self) -> dict[str, float]:
        """Return what gzip and the frequencies of bytes reach on the evaluation text."""
        counts = [text.counts(self.encoding.n_vocab) for text in (self.corpus.train, self.eval_text)]
        return {**super().baselines(), "byte unigram": unigram_bits_per_byte(counts[0], counts[1], self.encoding)}

    def _read_text(self) -> TokenStream:
        self.corpus = prepare_corpus(self.options.text, self.encoding, seed=self.context.options.seed)
        cut = self.options.windows
        self.windows = [
            TokenWindows(text, cut.max_length, cut.step, packing=cut.packing) for text in self.corpus.sources
        ]
        return self.corpus.eval


class StreamingTask(TextTask):
    """A GPT trained on a stream of text, tokenised during training."""

    def __init__(self, options: RunOptions, context: RunContext) -> None:
        if context.options.max_steps is None:
            raise UsageError("streaming needs max_steps: the length of an epoch is not known for a stream")
        super().__init__(options, context)
        self.order = StreamOrder()
        self._batches: StreamBatches | None = None

    def batches(self, plan: BatchPlan, first_step: int, last_step: int, position: Any) -> Iterator[Batch]:
        """Yield this process's micro-batches; the position holds the state of every stream shard."""
        workers, on_gpu = self.context.options.dataloader_num_workers, self.context.accelerator.device.type == "cuda"
        self._batches = StreamBatches(self.stream_shards, plan, num_workers=workers, pin_memory=on_gpu)
        states = {int(shard): state for shard, state in (position or {}).items()}
        return self._batches.steps(first_step, last_step, states)

    def position(self) -> dict[str, Any]:
        """Return the state of every stream shard, gathered from all processes."""
        assert self._batches is not None
        states: list[tuple[int, Any]] = gather_object(list(self._batches.states.items()))
        return {str(shard): state for shard, state in sorted(states, key=lambda each: each[0])}

    def describe(self) -> list[str]:
        """Return log lines that describe the stream and the model."""
        shards, count = sum(len(each.shards) for each in self.stream_shards), len(self.stream_shards)
        return [
            f"text     a stream of {shards} shards in {count} stream shard{'s' if count > 1 else ''}, "
            f"{len(self.eval_text):,} eval tokens ({self.encoding.name}, vocabulary of {self.encoding.n_vocab:,})",
            *(f"text     {note}" for note in source_notes(self.options.text)),
            self.describe_model(),
        ]

    def _read_text(self) -> TokenStream:
        text, chosen = self.options.text, self.context.options
        _, source = train_sources(text)[0]
        shards = source.streamed_shards(encodings.may_cut(self.encoding))
        count = stream_shard_count(len(shards), chosen.batch_size)
        bounds = [index * len(shards) // count for index in range(count + 1)]
        self.stream_shards = [
            StreamShard(
                shards=tuple(shards[bounds[index] : bounds[index + 1]]),
                encoding=self.encoding,
                windows=self.options.windows,
                shuffle_windows=text.shuffle_windows,
                seed=chosen.seed * count + index,
            )
            for index in range(count)
        ]
        eval_text, key = prepare_eval(text, self.encoding)
        # The text itself is not read in advance: the names and sizes of the shards stand for it.
        seen = (key, [shard.sketch() for shard in shards], count, encodings.fingerprint(self.encoding))
        self.fingerprint = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
        return eval_text
