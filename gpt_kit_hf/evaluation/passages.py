"""Passages of a text with what a model expected at each token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import tiktoken
import torch
from transformers import PreTrainedModel

from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.evaluation.token_scores import Beliefs, beliefs_of
from gpt_kit_hf.evaluation.windows import DocumentWindows
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN

_LIKELIEST = 3


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    r"""A token of a passage, with its log-probability in nats and its rank, 1 for the likeliest.

    `likeliest` are the tokens that the model expected most, with their probabilities. Bytes that are no whole
    character are written as \xNN.
    """

    text: str
    logprob: float
    rank: int
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Tokens in a row, of which the first was read after `before`, a token or the mark of a text's beginning."""

    before: str
    tokens: tuple[ScoredToken, ...]


def scored_passages(
    model: PreTrainedModel, stream: TokenStream, encoding: tiktoken.Encoding, *, tokens: int, max_length: int
) -> list[Passage]:
    """Return about `tokens` tokens of a text, in passages of at most `max_length` from all of it, in its order.

    Each passage is scored by one plain forward pass, as `evaluate_stream` scores windows without overlap: its first
    token has no context, except for the token or mark before it. Raises DataError for a stream without text.
    """
    windows = DocumentWindows(
        stream,
        end_of_text=encoding.encode_single_token(EOS_TOKEN),
        begin_of_text=encodings.begin_of_text(encoding),
        max_length=max_length,
        stride=max_length,
    )
    passages = []
    for window in sorted(windows.spread(tokens).tolist()):
        read, targets = windows[window]
        following, first = [*read[1:].tolist(), int(targets[-1])], int((targets < 0).sum())
        with torch.inference_mode():
            logits = model(read[None].to(model.device), use_cache=False).logits[0]  # (T, V)
            beliefs = beliefs_of(logits, following, _LIKELIEST)
        scored = tuple(_scored(following, beliefs, encoding))[first:]
        passages.append(Passage(before=_spelled(encoding, int(read[first])), tokens=scored))
    return passages


def _scored(following: Sequence[int], beliefs: Beliefs, encoding: tiktoken.Encoding) -> Iterator[ScoredToken]:
    columns = (beliefs.next_logprob, beliefs.next_rank, beliefs.top_ids, beliefs.top_logprobs)
    rows = zip(following, *(column.tolist() for column in columns), strict=True)
    for token, logprob, rank, top_ids, top_logprobs in rows:
        expected = zip(top_ids, top_logprobs, strict=True)
        likeliest = tuple((_spelled(encoding, each), math.exp(own)) for each, own in expected)
        yield ScoredToken(text=_spelled(encoding, token), logprob=logprob, rank=rank, likeliest=likeliest)


def _spelled(encoding: tiktoken.Encoding, token: int) -> str:
    try:
        return encoding.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    except KeyError:  # an id beyond the vocabulary, which a model may expect
        return f"<{token}>"
