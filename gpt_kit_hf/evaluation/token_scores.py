"""What a model believes at each token of a text, from its logits.

Shapes: T tokens, V vocabulary size, K alternatives. Log-probabilities and entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt_kit_hf.generation.completion import LOWEST_TEMPERATURE

_LOWEST = -200.0  # a log-probability whose probability is 0 in float32
_ROWS_AT_ONCE = 128  # of logits, which are V numbers each


class Beliefs(NamedTuple):
    """What a model expects after each of T tokens; the last token is followed by what was not read."""

    entropy: Tensor  # (T,) of the distribution of the next token
    top_ids: Tensor  # (T, K) the likeliest next tokens, the likeliest first
    top_logprobs: Tensor  # (T, K)
    next_logprob: Tensor  # (T,) of the token that does follow; nan after the last
    next_rank: Tensor  # (T,) int64: 1 if no token is likelier than the one that follows; 0 after the last


def beliefs_of(logits: Tensor, next_ids: Sequence[int], top: int) -> Beliefs:
    """Return what logits, (T, V), say; `next_ids` are the tokens that follow, T or T - 1 of them."""
    parts = []
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = logits[start : start + _ROWS_AT_ONCE].float()
        known = torch.tensor(next_ids[start : start + len(rows)], dtype=torch.long, device=rows.device)
        parts.append(_beliefs_of_rows(rows, known, top))
    return Beliefs(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))


def _beliefs_of_rows(rows: Tensor, known: Tensor, top: int) -> Beliefs:
    logprobs = rows.log_softmax(dim=-1)
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    # Clamped, a token that cannot come adds 0, not 0 * -inf.
    entropy = -(logprobs.exp() * logprobs.clamp(min=_LOWEST)).sum(dim=-1)
    n = len(known)
    next_logprob, next_rank = rows.new_full((len(rows),), math.nan), known.new_zeros(len(rows))
    next_logprob[:n] = logprobs[:n].gather(1, known[:, None])[:, 0]
    next_rank[:n] = 1 + (logprobs[:n] > next_logprob[:n, None]).sum(dim=-1)
    return Beliefs(entropy, best.indices, best.values, next_logprob, next_rank)


def score_tokens(model: PreTrainedModel, ids: Sequence[int], top: int = 10) -> Beliefs:
    """Return what a causal model expects after each id, by one plain forward pass; the model is in eval mode."""
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]  # (T, V)
        return beliefs_of(logits, ids[1:], top)


class Sampled(NamedTuple):
    """The distribution of the next token before and after temperature, top-k and top-p; each (V,)."""

    before: Tensor
    after: Tensor

    @property
    def n_kept(self) -> int:
        """How many tokens can still be chosen."""
        return int((self.after > 0).sum())

    @property
    def cut(self) -> float:
        """The probability, in the model's own distribution, of all tokens that cannot be chosen any more."""
        return float(self.before[self.after == 0].sum())


def sampling_distribution(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float) -> Sampled:
    """Return what is sampled from for logits (V,), as generation does; temperature 0 leaves the likeliest token."""
    logits = logits.float()
    before = logits.softmax(dim=-1)
    if temperature < LOWEST_TEMPERATURE:
        return Sampled(before, torch.zeros_like(before).scatter(0, logits.argmax(dim=-1, keepdim=True), 1.0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return Sampled(before, warpers(None, logits[None]).softmax(dim=-1)[0])


def bits_per_byte(logprobs: Tensor, n_bytes: int) -> float | None:
    """Return the bits that the tokens of these log-probabilities cost per byte of their text; None without bytes."""
    return float(-logprobs.double().sum()) / math.log(2) / n_bytes if n_bytes else None
