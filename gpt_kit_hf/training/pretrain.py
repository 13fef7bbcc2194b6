"""Pretraining on text, stored or streamed: from options to a model folder."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

from gpt_kit_hf.data.order import BatchPlan, MixtureOrder, ShuffledOrder, StreamOrder
from gpt_kit_hf.data.text.corpus import Corpus, prepare_corpus, prepare_eval
from gpt_kit_hf.data.text.documents import READ
from gpt_kit_hf.data.text.report import Reading, describe_documents, describe_stream
from gpt_kit_hf.data.text.sources import source_notes, train_sources
from gpt_kit_hf.data.text.streaming import StreamBatches, StreamShard, stream_shard_count
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.data.text.windows import EpochWindows, collate_windows
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.evaluation.metrics import unigram_bits_per_byte
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.run import CHANGED_TEXT, OptionsOfRun, RunOptions, with_recipe
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.log.run_log import RunResult
from gpt_kit_hf.training.loop import run_training
from gpt_kit_hf.training.planning.page import planned_options
from gpt_kit_hf.training.planning.recipe import recipe_by_length
from gpt_kit_hf.training.runtime.signals import StopSignals
from gpt_kit_hf.training.steps import total_steps
from gpt_kit_hf.training.task import RunContext, joined_position
from gpt_kit_hf.training.text_task import TextTask

# Tokens of the training text that are counted for a baseline: the other processes wait meanwhile.
_COUNTED = 1 << 28


def train(options: RunOptions, *, stream: TextIO | None = sys.stdout) -> RunResult:
    """Pretrain a GPT on text, or resume to; progress is written to `stream`.

    The run folder then holds the model for `from_pretrained`, its checkpoints, metrics.jsonl, loss.png and run.json.
    Raises what `run_training` raises.
    """
    if options.plan.budget is not None:
        with StopSignals():
            options = planned_options(options, Console(stream, options.training.log_format).log)
    return run_training(options, lambda context: text_task(options, context), stream=stream)


def text_task(options: RunOptions, context: RunContext) -> TextTask:
    """Return the task for stored or streamed text, as the options say."""
    return StreamingTask(options, context) if options.text.streaming else PretrainingTask(options, context)


class PretrainingTask(TextTask):
    """A GPT trained on the windows of a stored corpus."""

    data_name = CHANGED_TEXT
    corpus: Corpus
    dataset: EpochWindows
    collate = staticmethod(collate_windows)

    def __init__(self, options: RunOptions, context: RunContext) -> None:
        super().__init__(options, context)
        seed = context.options.seed
        self.fingerprint = self.corpus.fingerprint
        sizes, other_windows = self.dataset.sizes, self.windows.reshuffle
        if len(sizes) == 1:
            self.order = ShuffledOrder(samples=sizes[0], seed=seed, reshuffled=other_windows)
        else:
            self.order = MixtureOrder(sizes=sizes, weights=self.corpus.weights, seed=seed, reshuffled=other_windows)

    def with_recipe(self, options: OptionsOfRun) -> OptionsOfRun:
        """Return the options of a new run with what its recipe sets by the text and the length; log what that is."""
        if self.base is not None:
            return options
        batch_size, n_vocab = self.context.options.batch_size, self.encoding.n_vocab
        steps = total_steps(self.context.options, self.order.samples)
        epochs = steps * batch_size / self.order.samples
        by_length = recipe_by_length(
            steps,
            step_tokens=batch_size * self.windows.length,
            epochs=epochs,
            parameters_per_token=sum(p.numel() for p in self.model.model.layers.parameters()) / len(self.corpus.train),
            vocab_size=n_vocab,
        )
        found, before = with_recipe(options, by_length), dataclasses.asdict(options.optimizer)
        after = dataclasses.asdict(found.optimizer)
        changed = [f"{name} {value}" for name, value in after.items() if value != before[name]]
        if changed:
            run = f"{steps:,} steps, {epochs:.2f} epochs, a vocabulary of {n_vocab:,}"
            self.context.console.log(f"recipe   for {run}: {', '.join(changed)}")
        return found

    def _begins(self) -> bool:
        """Return whether texts are trained to follow the token that documents begin after: a single one is not."""
        return self.corpus.documents > 1 or self._begin is not None or self.base is not None

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
        if self.context.accelerator.is_main_process:
            of_ids = self.options.text.token_files is not None
            lines += describe_documents(corpus.text, corpus.encoding, of_ids=of_ids)
        lines += corpus.reading.lines(self.options.text)
        if corpus.eval_reading is not None:
            lines += corpus.eval_reading.lines(self.options.text, "eval text")
        return [*lines, self.describe_model()]

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about the text."""
        corpus = self.corpus
        counts: dict[str, Any] = {"documents": corpus.documents, "train_tokens": len(corpus.train)}
        counts["text_read"] = corpus.reading.facts()
        if corpus.eval_reading is not None:
            counts["eval_text_read"] = corpus.eval_reading.facts()
        return {**counts, **super().facts()}

    def baselines(self) -> dict[str, float]:
        """Return what gzip and the frequencies of bytes reach on the evaluation text."""
        size = self.encoding.n_vocab
        counts = [self.corpus.train.counts(size, at_most=_COUNTED), self.eval_text.counts(size)]
        return {**super().baselines(), "byte unigram": unigram_bits_per_byte(counts[0], counts[1], self.encoding)}

    def _read_text(self) -> TokenStream:
        self.corpus = prepare_corpus(
            self.options.text, self.encoding, seed=self.context.options.seed, log=self.context.console.log
        )
        self.dataset = EpochWindows(self.corpus.sources, self.windows, seed=self.context.options.seed)
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
        """Return the state of every stream shard that this process reads."""
        assert self._batches is not None
        return {str(shard): state for shard, state in sorted(self._batches.states.items())}

    def describe(self) -> list[str]:
        """Return log lines that describe the stream and the model."""
        texts, count = [shard for each in self.stream_shards for shard in each.shards], len(self.stream_shards)
        separator = self.options.text.separator
        return [
            f"text     a stream of {len(texts)} shards in {count} stream shard{'s' if count > 1 else ''}, "
            f"{len(self.eval_text):,} eval tokens ({self.encoding.name}, vocabulary of {self.encoding.n_vocab:,})",
            *(f"text     {note}" for note in source_notes(self.options.text)),
            *(describe_stream(texts, self.encoding, separator) if self.context.accelerator.is_main_process else []),
            *self.eval_reading.lines(self.options.text, "eval text"),
            self.describe_model(),
        ]

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about the text."""
        return {"eval_text_read": self.eval_reading.facts(), **super().facts()}

    def final_facts(self) -> dict[str, Any]:
        """Return what was read of the stream, also as log lines."""
        tally = Counter[str]()
        for state in joined_position(self.position()).values():
            tally.update(state.get("seen", {}))
        reading = Reading(tally=tally, used=0)
        reading = dataclasses.replace(reading, used=tally[READ] - sum(reading.left_out.values()))
        for line in reading.lines(self.options.text, "stream, counted in each pass"):
            self.context.console.log(line)
        return {"text_read": reading.facts()}

    def _read_text(self) -> TokenStream:
        text, chosen = self.options.text, self.context.options
        _, source = train_sources(text)[0]
        shards = source.streamed_shards(encodings.may_cut(self.encoding))
        count = stream_shard_count(len(shards), chosen.batch_size, text.stream_shards)
        bounds = [index * len(shards) // count for index in range(count + 1)]
        self.stream_shards = [
            StreamShard(
                shards=tuple(shards[bounds[index] : bounds[index + 1]]),
                encoding=self.encoding,
                windows=self.windows,
                shuffle_windows=text.shuffle_windows,
                seed=chosen.seed * count + index,
            )
            for index in range(count)
        ]
        eval_text, key, self.eval_reading = prepare_eval(text, self.encoding, self.context.console.log)
        # The text itself is not read in advance: the names and sizes of the shards stand for it.
        seen = (key, [shard.sketch() for shard in shards], count, encodings.fingerprint(self.encoding))
        self.fingerprint = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
        return eval_text
