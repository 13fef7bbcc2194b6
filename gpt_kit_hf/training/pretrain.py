"""Pretraining on text: from options to a model folder."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from accelerate.utils import gather_object
from torch.utils.data import ConcatDataset

from gpt_kit_hf.data.order import BatchPlan, MixtureOrder, Order, ShuffledOrder, StreamOrder
from gpt_kit_hf.data.text.corpus import Corpus, prepare_corpus, prepare_held_out
from gpt_kit_hf.data.text.sources import train_sources
from gpt_kit_hf.data.text.streaming import Lane, LaneBatches, lane_count
from gpt_kit_hf.data.text.windows import TokenStream, TokenWindows, collate_windows
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.evaluation.metrics import unigram_bits_per_byte
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.run import RunOptions
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.training.loop import run_training
from gpt_kit_hf.training.run_log import RunResult
from gpt_kit_hf.training.task import RunSetting, map_batches
from gpt_kit_hf.training.text_task import TextTask


def train(options: RunOptions, *, stream: TextIO | None = sys.stdout) -> RunResult:
    """Train a GPT on text as the options say, or continue to; progress goes to `stream`.

    The folder then holds the model as `from_pretrained` loads it, its checkpoints, metrics.jsonl, loss.png and
    run.json. Errors are those of `run_training`.
    """
    task = StreamingTask if options.text.streaming else PretrainingTask
    return run_training(options, lambda setting: task(options, setting), stream=stream)


class PretrainingTask(TextTask):
    """A GPT and the windows of a stored corpus that it is trained on."""

    corpus: Corpus

    def __init__(self, options: RunOptions, setting: RunSetting) -> None:
        super().__init__(options, setting)
        seed = setting.options.seed
        self.fingerprint = self.corpus.fingerprint
        self.order: Order = ShuffledOrder(samples=len(self.windows[0]), seed=seed)
        if len(self.windows) > 1:
            self.order = MixtureOrder(sizes=tuple(map(len, self.windows)), weights=self.corpus.weights, seed=seed)

    def batches(self, plan: BatchPlan, first_step: int, last_step: int, position: Any) -> Iterator[Batch]:
        """Yield this process's micro-batches."""
        windows = self.windows[0] if len(self.windows) == 1 else ConcatDataset(self.windows)
        return map_batches(windows, collate_windows, plan, (first_step, last_step), self.setting)

    def position(self) -> None:
        """Return None: the step says it all."""

    def describe(self) -> list[str]:
        """Return lines that say what the text and the model are."""
        corpus, order = self.corpus, self.order
        lines = [
            f"text     {corpus.documents:,} documents, {len(corpus.train):,} tokens to train on, "
            f"{len(corpus.held_out):,} held out ({corpus.encoding.name}, {corpus.encoding.n_vocab:,} tokens)"
        ]
        if isinstance(order, MixtureOrder):
            named = zip(self.options.text.mixture or [], order.quotas, corpus.sources, strict=True)
            total = sum(order.quotas)
            lines += [f"mixture  {quota / total:.1%} {name}: {len(part):,} tokens" for name, quota, part in named]
        return [*lines, self.describe_model()]

    def facts(self) -> dict[str, Any]:
        """Return what the record keeps of the text."""
        return {
            "documents": self.corpus.documents,
            "train_tokens": len(self.corpus.train),
            **super().facts(),
        }

    def baselines(self) -> dict[str, float]:
        """Return what gzip and the frequencies of bytes reach on the held-out text."""
        counts = [stream.counts(self.encoding.n_vocab) for stream in (self.corpus.train, self.held_out)]
        return {**super().baselines(), "byte unigram": unigram_bits_per_byte(counts[0], counts[1], self.encoding)}

    def _read_text(self) -> TokenStream:
        # One process of a machine tokenises; the others find what it stored.
        with self.setting.accelerator.local_main_process_first():
            self.corpus = prepare_corpus(self.options.text, self.encoding, seed=self.setting.options.seed)
        cut = self.options.windows
        self.windows = [
            TokenWindows(stream, cut.max_length, cut.step, packing=cut.packing) for stream in self.corpus.sources
        ]
        return self.corpus.held_out


class StreamingTask(TextTask):
    """A GPT and the stream of text that it is trained on, tokenised meanwhile; `max_steps` says how long."""

    def __init__(self, options: RunOptions, setting: RunSetting) -> None:
        if setting.options.max_steps is None:
            raise UsageError("streaming needs max_steps: a stream does not say how long an epoch is")
        super().__init__(options, setting)
        self.order: Order = StreamOrder()
        self._batches: LaneBatches | None = None

    def batches(self, plan: BatchPlan, first_step: int, last_step: int, position: Any) -> Iterator[Batch]:
        """Yield this process's micro-batches; the position is the state of every lane."""
        workers, on_gpu = self.setting.options.dataloader_num_workers, self.setting.accelerator.device.type == "cuda"
        self._batches = LaneBatches(self.lanes, plan, num_workers=workers, pin_memory=on_gpu)
        states = {int(lane): state for lane, state in (position or {}).items()}
        return self._batches.steps(first_step, last_step, states)

    def position(self) -> dict[str, Any]:
        """Return the state of every lane, those of the other processes too."""
        assert self._batches is not None
        states: list[tuple[int, Any]] = gather_object(list(self._batches.states.items()))
        return {str(lane): state for lane, state in sorted(states, key=lambda each: each[0])}

    def describe(self) -> list[str]:
        """Return lines that say what the text and the model are."""
        units, lanes = sum(len(lane.units) for lane in self.lanes), len(self.lanes)
        return [
            f"text     a stream of {units} units in {lanes} lane{'s' if lanes > 1 else ''}, {len(self.held_out):,} "
            f"tokens held out ({self.encoding.name}, {self.encoding.n_vocab:,} tokens)",
            self.describe_model(),
        ]

    def _read_text(self) -> TokenStream:
        text, chosen = self.options.text, self.setting.options
        _, source = train_sources(text)[0]
        units = source.streamed_units(encodings.may_cut(self.encoding))
        count = lane_count(len(units), chosen.batch_size)
        bounds = [lane * len(units) // count for lane in range(count + 1)]
        self.lanes = [
            Lane(
                units=tuple(units[bounds[lane] : bounds[lane + 1]]),
                encoding=self.encoding,
                windows=self.options.windows,
                shuffle_windows=text.shuffle_windows,
                seed=chosen.seed * count + lane,
            )
            for lane in range(count)
        ]
        with self.setting.accelerator.local_main_process_first():
            held_out, key = prepare_held_out(text, self.encoding)
        # The text itself is not read before it is needed: its sizes and ends stand for it.
        seen = (key, [unit.sketch() for unit in units], count, encodings.fingerprint(self.encoding))
        self.fingerprint = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
        return held_out
