"""Metrics of evaluation text: loss, perplexity, bits per byte, and baselines that need no model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import tiktoken
import torch
from accelerate import Accelerator
from tokenizers.decoders import ByteLevel
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.data.text.windows import IGNORED
from gpt_kit_hf.errors import StoppedError, UsageError
from gpt_kit_hf.evaluation.windows import DocumentWindows, pad_windows
from gpt_kit_hf.model.losses import Batch, evaluation_mode, summed_batch_loss
from gpt_kit_hf.options.evaluation import PaddingSide
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A score: the mean `loss` in nats per token over `tokens` targets, which spell `text_bytes` bytes of UTF-8."""

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally likely tokens that would be as hard to predict."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of the text, which can be compared between vocabularies."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes


def token_byte_lengths(encoding: tiktoken.Encoding) -> _Ints:
    """Return the number of text bytes that each id spells, (n_vocab,); special tokens spell none."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in range(encoding.n_vocab):
        with suppress(KeyError):  # a vocabulary may have ids without a token, which never occur
            lengths[token] = len(encoding.decode_single_token_bytes(token))
    lengths[[encoding.encode_single_token(token) for token in encoding.special_tokens_set]] = 0
    return lengths


def tokenizer_byte_lengths(tokenizer: PreTrainedTokenizerBase, n_vocab: int) -> _Ints:
    """Return the number of text bytes that each id of a transformers tokenizer spells, (n_vocab,); special ones 0."""
    lengths = np.zeros(n_vocab, dtype=np.int64)
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    # In a byte-level vocabulary each character of a token stands for one byte.
    by_bytes = fast and isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        if index < n_vocab and index not in special:
            lengths[index] = len(token) if by_bytes else len(tokenizer.decode([index]).encode())
    return lengths


def evaluate_stream(
    model: nn.Module,
    stream: TokenStream,
    byte_lengths: _Ints,
    *,
    end_of_text: int,
    begin_of_text: int | None = None,
    max_length: int,
    stride: int,
    batch_size: int,
    padding_side: PaddingSide = "right",
    max_tokens: int | None = None,
    accelerator: Accelerator | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score each token of a stream's documents once, in windows of `max_length` tokens that start `stride` apart.

    A document is scored by itself, after an EOS token, or after the `begin_of_text` that it starts with. With a stride
    below max_length, a token has at least max_length - stride tokens of context, where its document has them
    (`DocumentWindows`). The result does not depend on `batch_size` or `padding_side`. `max_tokens` limits the score to
    about that many tokens, from the whole text.
    Processes share the windows, and all return the result. The model's mode and torch's random state do not change.

    Raises DataError for a stream without text, and StoppedError where `stop()`, called before each batch, returned
    true in any process.
    """
    windows = DocumentWindows(
        stream, end_of_text=end_of_text, begin_of_text=begin_of_text, max_length=max_length, stride=stride
    )
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    loader = DataLoader(
        Subset(windows, windows.spread(max_tokens)[rank::world].tolist()),
        batch_size=batch_size,
        collate_fn=partial(pad_windows, filler=end_of_text, side=padding_side),
        generator=torch.Generator(),
    )
    return evaluate_batches(model, loader, byte_lengths, accelerator=accelerator, autocast=autocast, stop=stop)


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    byte_lengths: _Ints,
    *,
    accelerator: Accelerator | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score the trained tokens of batches; each process passes its own, and all return the result of all.

    The model's mode does not change. Raises UsageError if the tokens spell no bytes, StoppedError as
    `evaluate_stream` does.
    """
    total, tokens, text_bytes, stopped = 0.0, 0, 0, False
    shared = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
    if shared is not None and _is_sharded(model):
        batches = _in_step(batches, shared, stop)
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            if stopped := stop():
                break
            with autocast():
                scores = summed_batch_loss(batch.input_ids, batch.targets, model, position_ids=batch.position_ids)
            total += float(scores.loss_sum)
            scored = batch.targets[batch.targets != IGNORED].numpy()
            tokens += scored.size
            text_bytes += int(byte_lengths[scored].sum())
    if shared is not None:
        sums = torch.tensor([total, tokens, text_bytes, stopped], dtype=torch.float64, device=shared.device)
        total, tokens, text_bytes, stopped = shared.reduce(sums, reduction="sum").tolist()
    if stopped:
        raise StoppedError("the evaluation was stopped")
    if text_bytes == 0:
        raise UsageError("the evaluation text spells no bytes: there is nothing to score")
    return Evaluation(loss=total / tokens, tokens=int(tokens), text_bytes=int(text_bytes))


def _is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule  # slow to import

    return isinstance(model, FSDPModule)


def _in_step(batches: Iterable[Batch], accelerator: Accelerator, stop: Callable[[], bool]) -> Iterator[Batch]:
    """Yield batches until every process has yielded all of its own.

    In a forward pass of a sharded model the processes wait for each other: one without a batch left takes part with a
    batch that scores nothing. Raises StoppedError in all of them when one is to stop.
    """
    own = iter(batches)
    idle = Batch(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORED), None)
    while True:
        batch = next(own, None)
        state = torch.tensor([batch is not None, stop()], dtype=torch.long, device=accelerator.device)
        more, stopped = accelerator.reduce(state, reduction="sum").tolist()
        if stopped:
            raise StoppedError("the evaluation was stopped")
        if not more:
            return
        yield idle if batch is None else batch


def unigram_bits_per_byte(train: _Ints, evaluated: _Ints, encoding: tiktoken.Encoding) -> float:
    """Return the bits per byte of predicting each byte by its frequency in the training text, plus one.

    `train` and `evaluated` are counts of ids, (n_vocab,).
    """
    seen = byte_counts(train, encoding) + 1.0
    wanted = byte_counts(evaluated, encoding)
    return float(-(wanted * np.log2(seen / seen.sum())).sum() / wanted.sum())


def byte_counts(counts: _Ints, encoding: tiktoken.Encoding) -> npt.NDArray[np.float64]:
    """Return how often each byte occurs, (256,), in text whose ids occur `counts` times, (n_vocab,)."""
    totals = np.zeros(256, dtype=np.float64)
    end = encoding.encode_single_token(EOS_TOKEN)
    for token in np.flatnonzero(counts):
        if token != end:
            spelled = np.frombuffer(encoding.decode_single_token_bytes(int(token)), dtype=np.uint8)
            totals += np.bincount(spelled, minlength=256) * counts[token]
    return totals


def gzip_bits_per_byte(
    stream: TokenStream, encoding: tiktoken.Encoding, *, window_bits: int = zlib.MAX_WBITS
) -> float:
    """Return the bits per byte of the stream's text, compressed by gzip at level 9.

    It finds what stands less than 2**window_bits bytes before; `gzip -9` looks 32 KB back.
    """
    end = encoding.encode_single_token(EOS_TOKEN)
    packer = zlib.compressobj(9, wbits=window_bits | 16)  # 16 asks for the gzip format
    packed = text_bytes = 0
    for first in range(0, len(stream), 1 << 20):
        ids = stream.read(first, min(first + (1 << 20), len(stream)))
        text = encoding.decode_bytes(ids[ids != end].tolist())
        packed += len(packer.compress(text))
        text_bytes += len(text)
    return 8.0 * (packed + len(packer.flush())) / text_bytes
