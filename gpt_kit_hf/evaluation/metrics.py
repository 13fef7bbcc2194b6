"""How well a model predicts held-out text: loss, perplexity, bits per byte, and what is easily reached without one."""

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
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase

from gpt_kit_hf.data.text.windows import IGNORED, TokenStream
from gpt_kit_hf.errors import StoppedError, UsageError
from gpt_kit_hf.evaluation.windows import DocumentWindows, pad_windows
from gpt_kit_hf.model.losses import Batch, evaluation_mode, summed_batch_loss
from gpt_kit_hf.options.evaluation import PaddingSide
from gpt_kit_hf.tokenization.encodings import END_OF_TEXT


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model scored: `loss` in nats a token over `tokens` targets, which spell `text_bytes` bytes of UTF-8."""

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of equally likely tokens that would be as hard to guess."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text: comparable between vocabularies."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes


def token_byte_lengths(encoding: tiktoken.Encoding) -> npt.NDArray[np.int64]:
    """Return how many bytes of text each id spells, (n_vocab,); end of text spells none."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    end = encoding.encode_single_token(END_OF_TEXT)
    for token in range(encoding.n_vocab):
        # Ids without a token are allowed in a vocabulary, and never occur.
        with suppress(KeyError):
            lengths[token] = len(encoding.decode_single_token_bytes(token))
    lengths[end] = 0
    return lengths


def tokenizer_byte_lengths(tokenizer: PreTrainedTokenizerBase, n_vocab: int) -> npt.NDArray[np.int64]:
    """Return how many bytes of text each id of a tokenizer of transformers spells, (n_vocab,); special ones none."""
    lengths = np.zeros(n_vocab, dtype=np.int64)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    by_bytes = backend is not None and "ByteLevel" in type(backend.decoder).__name__
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        if index < n_vocab and index not in special:
            # A byte-level token has a character for each byte.
            lengths[index] = len(token) if by_bytes else len(tokenizer.decode([index]).encode())
    return lengths


def evaluate_stream(
    model: nn.Module,
    stream: TokenStream,
    byte_lengths: npt.NDArray[np.int64],
    *,
    end_of_text: int,
    max_length: int,
    stride: int,
    batch_size: int,
    padding_side: PaddingSide = "right",
    max_tokens: int | None = None,
    accelerator: Accelerator | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score each token of a stream's documents once, by windows of `max_length` tokens that start `stride` apart.

    A document is read alone, after an end of text; with a stride below max_length each token is seen with at least
    max_length - stride tokens before it, where its document has them (`DocumentWindows`). The result does not depend
    on `batch_size` or `padding_side`. With `max_tokens` only about so many tokens, from all over the text, are scored.
    Processes share the windows and all get the result. The model keeps its mode and torch's random state does not
    move. Raises DataError for a stream without text, StoppedError where `stop()`, asked before each batch, was true
    in any of the processes.
    """
    windows = DocumentWindows(stream, end_of_text=end_of_text, max_length=max_length, stride=stride)
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
    byte_lengths: npt.NDArray[np.int64],
    *,
    accelerator: Accelerator | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score the trained tokens of batches, each process its own; all processes get the result.

    The model keeps its mode. Raises UsageError if the tokens spell no bytes, StoppedError as `evaluate_stream`.
    """
    world = accelerator.num_processes if accelerator else 1
    total, tokens, text_bytes, stopped = 0.0, 0, 0, False
    with evaluation_mode(model), torch.no_grad():
        for batch in batches if not isinstance(model, FSDPModule) else _in_step(batches, accelerator, stop):
            if stopped := stop():
                break
            with autocast():
                scores = summed_batch_loss(batch.input_ids, batch.targets, model, position_ids=batch.position_ids)
            total += float(scores.loss_sum)
            scored = batch.targets[batch.targets != IGNORED].numpy()
            tokens += scored.size
            text_bytes += int(byte_lengths[scored].sum())
    if accelerator is not None and world > 1:
        sums = torch.tensor([total, tokens, text_bytes, stopped], dtype=torch.float64, device=accelerator.device)
        total, tokens, text_bytes, stopped = accelerator.reduce(sums, reduction="sum").tolist()
    if stopped:
        raise StoppedError("the evaluation was stopped")
    if text_bytes == 0:
        raise UsageError("the held-out text spells no bytes: there is nothing to score")
    return Evaluation(loss=total / tokens, tokens=int(tokens), text_bytes=int(text_bytes))


def _in_step(batches: Iterable[Batch], accelerator: Accelerator | None, stop: Callable[[], bool]) -> Iterator[Batch]:
    """Yield batches until all processes have had theirs, or one shall stop.

    In each pass through a model that is cut over processes each waits for the others: one that has no batch left takes
    part with one that scores nothing.
    """
    assert accelerator is not None
    own = iter(batches)
    idle = Batch(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORED), None)
    while True:
        batch = next(own, None)
        state = torch.tensor([batch is not None, stop()], dtype=torch.long, device=accelerator.device)
        more, stopped = accelerator.reduce(state, reduction="sum").tolist()
        if stopped or not more:
            return
        yield idle if batch is None else batch


def unigram_bits_per_byte(
    train: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64], encoding: tiktoken.Encoding
) -> float:
    """Return the bits per byte of guessing each byte by its share in the training text, one added to each count.

    `train` and `held_out` are counts of ids, (n_vocab,).
    """
    seen = byte_counts(train, encoding) + 1.0
    wanted = byte_counts(held_out, encoding)
    return float(-(wanted * np.log2(seen / seen.sum())).sum() / wanted.sum())


def byte_counts(counts: npt.NDArray[np.int64], encoding: tiktoken.Encoding) -> npt.NDArray[np.float64]:
    """Return how often each byte occurs, (256,), in text whose ids occur `counts` times, (n_vocab,)."""
    totals = np.zeros(256, dtype=np.float64)
    end = encoding.encode_single_token(END_OF_TEXT)
    for token in np.flatnonzero(counts):
        if token != end:
            spelled = np.frombuffer(encoding.decode_single_token_bytes(int(token)), dtype=np.uint8)
            totals += np.bincount(spelled, minlength=256) * counts[token]
    return totals


def gzip_bits_per_byte(stream: TokenStream, encoding: tiktoken.Encoding) -> float:
    """Return the bits per byte of the stream's text compressed by gzip at its strongest."""
    end = encoding.encode_single_token(END_OF_TEXT)
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)  # 16 asks for gzip's frame
    packed = text_bytes = 0
    for first in range(0, len(stream), 1 << 20):
        ids = stream.read(first, min(first + (1 << 20), len(stream)))
        text = encoding.decode_bytes(ids[ids != end].tolist())
        packed += len(packer.compress(text))
        text_bytes += len(text)
    return 8.0 * (packed + len(packer.flush())) / text_bytes
