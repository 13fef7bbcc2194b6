"""Pretraining on text, stored or streamed: from options to a model folder."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import textwrap
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import tiktoken
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gpt_kit_hf.data.order import BatchPlan, MixtureOrder, ShuffledOrder, StreamOrder
from gpt_kit_hf.data.text.corpus import Corpus, check_stated_encoding, choose_encoding, prepare_corpus, prepare_eval
from gpt_kit_hf.data.text.documents import READ
from gpt_kit_hf.data.text.report import Reading, describe_documents, describe_stream
from gpt_kit_hf.data.text.sources import source_notes, train_sources
from gpt_kit_hf.data.text.streaming import StreamBatches, StreamShard, stream_shard_count
from gpt_kit_hf.data.text.tokenize import stored_shards, tokenize_text
from gpt_kit_hf.data.text.tokens.token_cache import cache_folder
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.data.text.windows import EpochWindows, collate_windows
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.evaluation.metrics import (
    Evaluation,
    evaluate_stream,
    gzip_bits_per_byte,
    token_byte_lengths,
    unigram_bits_per_byte,
)
from gpt_kit_hf.generation.generate import context_length
from gpt_kit_hf.hub.base_model import BaseModel
from gpt_kit_hf.hub.model_folder import load_text_encoding, write_model_folder
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options.data import TRAINED_BPE, TextOptions, WindowOptions
from gpt_kit_hf.options.run import CHANGED_TEXT, RunOptions, ShareOptions
from gpt_kit_hf.text import short
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.export import load_encoding
from gpt_kit_hf.tokenization.model_encoding import encoding_of
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.log.run_log import RunResult
from gpt_kit_hf.training.loop import run_training
from gpt_kit_hf.training.needs.cost import random_rows
from gpt_kit_hf.training.planning.page import planned_options
from gpt_kit_hf.training.runtime.preparation import Preparation, prepare_together
from gpt_kit_hf.training.state.sharded_state import replace_weights, unsharded_model
from gpt_kit_hf.training.task import RunContext, Sample, Task, check_max_length, generate_sample, joined_position

# Tokens of the training text that are counted for a baseline: the other processes wait meanwhile.
_COUNTED = 1 << 28


def train(options: RunOptions, *, stream: TextIO | None = sys.stdout) -> RunResult:
    """Pretrain a GPT on text, or resume to; progress is written to `stream`.

    The run folder then holds the model for `from_pretrained`, its checkpoints, metrics.jsonl, loss.png and run.json.
    Raises what `run_training` raises.
    """
    if options.plan.budget is not None:
        options = planned_options(options, Console(stream, options.training.log_format).log)
    return run_training(options, lambda context: text_task(options, context), stream=stream)


def text_task(options: RunOptions, context: RunContext) -> TextTask:
    """Return the task for stored or streamed text, as the options say."""
    return StreamingTask(options, context) if options.text.streaming else PretrainingTask(options, context)


class TextTask(Task):
    """A new GPT, or a model to train further, and its evaluation text; subclasses add the training text."""

    eval_name = "eval text"

    def __init__(self, options: RunOptions, context: RunContext) -> None:
        self.options, self.context = options, context
        self.base = self._load_base()
        self.windows = self._choose_windows()
        context.console.log(f"reading  {_sources(options.text)}")
        with prepare_together(context.accelerator) as together:
            self.encoding = together.on_main(self._choose_encoding)
            self._tokenize(together)
            self.eval_text = self._read_text()
            together.gather(None)  # opening the shards of a large corpus takes minutes
        self._eos = self.encoding.encode_single_token(encodings.EOS_TOKEN)
        self._begin = encodings.begin_of_text(self.encoding)
        self._check_eval_text()
        self._eval_fingerprint = self.eval_text.fingerprint()
        self.byte_lengths = token_byte_lengths(self.encoding)
        self.tokens_per_sample = float(self.windows.length)
        self.model = self._build_model() if self.base is None else self.base.model
        self.eval_before_training = self.base is not None

    @abstractmethod
    def _read_text(self) -> TokenStream:
        """Prepare the training text; return the evaluation text."""

    def longest_rows(self, count: int) -> Batch:
        """Return windows of random ids: all windows are equally long."""
        return random_rows(self.encoding.n_vocab, self.windows.length)(count)

    def ids_evaluated(self, max_samples: int | None, batch_size: int) -> int:
        """Return the number of tokens that are scored."""
        tokens = len(self.eval_text)
        return tokens if max_samples is None else min(tokens, max_samples * self.windows.length)

    def evaluate(
        self, max_samples: int | None, batch_size: int, autocast: Callable[[], AbstractContextManager[object]]
    ) -> Evaluation:
        """Score the evaluation text, each token once."""
        max_length = self.windows.length
        return evaluate_stream(
            self.model,  # not the wrapped one: processes may have different numbers of windows
            self.eval_text,
            self.byte_lengths,
            end_of_text=self._eos,
            begin_of_text=self._begin,
            max_length=max_length,
            stride=max_length,
            batch_size=batch_size,
            max_tokens=None if max_samples is None else max_samples * max_length,
            accelerator=self.context.accelerator,
            autocast=autocast,
            stop=self.context.stop.asked,
        )

    def sample(self) -> Sample:
        """Return the model's continuation of the sample prompt, after what precedes a text."""
        chosen, begin = self.context.options, self._eos if self._begin is None else self._begin
        written = encodings.encode_ordinary(self.encoding, chosen.sample_prompt, "sample_prompt").tolist()
        before = self._before_text(begin)
        unseen = (self._eos, begin, encodings.get_pad_token_id(self.encoding))
        return generate_sample(
            self.model,
            torch.tensor([[*before, *written]]),
            chosen.sample_max_new_tokens,
            lambda ids: self.encoding.decode([token for token in ids[len(before) :] if token not in unseen]),
            temperature=0.8,
            top_k=50,
        )

    def _before_text(self, begin: int) -> list[int]:
        """Return what precedes the text of a sample: the token that documents begin after."""
        return [begin]

    def describe_model(self) -> str:
        """Return a log line with the model's name and size."""
        config, preset = self.model.config.get_text_config(decoder=True), self.options.model.model
        layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
        return (
            f"model    {preset if self.base is None else self.base.named}: {short(self.model.num_parameters())} "
            f"parameters, {layers} layer{'s' * (layers != 1)}, {heads} head{'s' * (heads != 1)}, {width} wide"
            + ("" if self.base is None else ", trained further")
        )

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json about the text."""
        return {
            **({} if self.base is None else self.base.facts()),
            "max_length": self.windows.length,
            "eval_tokens": len(self.eval_text),
            "eval_fingerprint": self._eval_fingerprint,
            "tokenizer_fingerprint": encodings.fingerprint(self.encoding),
        }

    def baselines(self) -> dict[str, float]:
        """Return what gzip reaches on the evaluation text."""
        return {"gzip -9": gzip_bits_per_byte(self.eval_text, self.encoding)}

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder for `from_pretrained`."""
        model: Any = unsharded_model(self.model)
        if self.base is None:
            write_model_folder(folder, model, self.encoding, weights)
        else:  # with what else the tokenizer and the generation defaults hold, such as a chat template
            model.save_pretrained(str(folder), state_dict=weights)
            self.base.tokenizer.save_pretrained(str(folder))

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the weights of a checkpoint; every process calls."""
        kind = GPTKitForCausalLM if self.base is None else AutoModelForCausalLM
        replace_weights(self.model, lambda: kind.from_pretrained(checkpoint, dtype=torch.float32).state_dict())

    def next_command(self, run: Path) -> list[str]:
        """Return the command that generates text."""
        return ["gpt-kit", "generate", str(run), "--prompt", self.context.options.sample_prompt or "The"]

    # --- preparation

    def _load_base(self) -> BaseModel | None:
        """Load the model to train further, or what a checkpoint has made of it."""
        chosen = self.options.model
        if chosen.model_name_or_path is None:
            return None
        folder, checkpoint = self.context.folder, self.context.checkpoint
        self.context.console.log(f"loading  {chosen.model_name_or_path}")
        return BaseModel(chosen.model_name_or_path, folder, checkpoint, dropout=chosen.dropout)

    def _choose_windows(self) -> WindowOptions:
        """Return the windows; refuse longer ones than the model's context, before the text is read."""
        chosen = self.options.windows
        if self.base is not None:
            if chosen.max_length is None:
                length = min(chosen.length, context_length(self.base.model) or chosen.length)
                return replace(chosen, max_length=length)
            check_max_length(self.base.model, chosen.length)
            return chosen
        return chosen

    def _choose_encoding(self) -> tiktoken.Encoding:
        if self.base is not None:
            found = encoding_of(self.base.tokenizer, Path(self.base.named).name)
            self._check_vocabulary(self.base, found)
            check_stated_encoding(self.options.text, found, f"that of {self.base.named!r}")
            return found
        if self.context.checkpoint is not None:
            return load_encoding(self.context.checkpoint)
        if self.options.encoding.encoding == TRAINED_BPE and not self.options.text.token_files:
            self.context.console.log(f"training a bpe of {self.options.encoding.vocab_size:,} tokens on the text")
        return choose_encoding(self.options.text, self.options.encoding)

    def _tokenize(self, together: Preparation) -> None:
        """Fill the token cache: each process that sees it tokenizes its share."""
        accelerator, text = self.context.accelerator, self.options.text
        if accelerator.num_processes == 1:
            return
        # Archives and tables are converted when they are listed: by one process of a machine.
        together.run(lambda: stored_shards(text, self.encoding), here=accelerator.is_local_main_process)
        peers = together.sharing(cache_folder(text.token_cache_dir))
        share = ShareOptions(num_shards=len(peers), shard_index=peers.index(accelerator.process_index))
        machines = together.gather(accelerator.local_process_index).count(0)
        own = replace(text, num_proc=max(1, text.num_proc * machines // accelerator.num_processes))
        together.run(lambda: tokenize_text(own, self.encoding, share, log=self.context.console.log))

    def _check_vocabulary(self, base: BaseModel, encoding: tiktoken.Encoding) -> None:
        """Refuse a tokenizer that is not the model's, and an option that names another."""
        size, asked = base.model.config.get_text_config().vocab_size, self.options.encoding.encoding
        if encoding.n_vocab > size:
            raise UsageError(f"{base.named!r} has embeddings for {size} ids, and its tokenizer {encoding.n_vocab}")
        expected = base.model.config.to_dict().get("tokenizer_fingerprint")
        if expected is not None:
            encodings.check_fingerprint(encoding, expected, base.named)
        if asked != TRAINED_BPE:
            own = load_text_encoding(asked, asked) if Path(asked).is_dir() else encodings.get_encoding(asked)
            if asked == "bytes" and encodings.get_pad_token_id(encoding) is not None:
                own = encodings.with_pad_token(own)
            if encodings.fingerprint(own) != encodings.fingerprint(encoding):
                raise UsageError(
                    f"encoding={asked!r} is not the tokenizer of model_name_or_path={base.named!r}, with which it is "
                    "trained further: leave encoding out"
                )

    def _check_eval_text(self) -> None:
        tokens, window = len(self.eval_text), self.windows.length + 1
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
            pad_token_id=encodings.get_pad_token_id(self.encoding),
            tokenizer_fingerprint=encodings.fingerprint(self.encoding),
        )
        torch.manual_seed(self.context.options.seed)
        return GPTKitForCausalLM(config)


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

    def _before_text(self, begin: int) -> list[int]:
        """Return what precedes the text of a sample: a line break if nothing was trained to follow `begin`."""
        follows = self.corpus.documents > 1 or self._begin is not None or self.base is not None
        return [begin] if follows else self.encoding.encode_ordinary("\n")

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


def _sources(text: TextOptions) -> str:
    """Return where the text comes from, in one line."""
    named = [*(text.text_files or []), *(text.token_files or []), *(text.mixture or []), text.dataset_name or ""]
    return textwrap.shorten(", ".join(filter(None, named)), 70, placeholder=" ...")
