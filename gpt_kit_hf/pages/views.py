"""What the page of a model shows, as JSON: each function computes one part of it.

Log-probabilities and entropies are in nats; a number that does not exist, or is infinite, is None.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.evaluation.text_comparison import common_pieces, most_different
from gpt_kit_hf.evaluation.token_scores import Beliefs, bits_per_byte, sampling_distribution
from gpt_kit_hf.pages.models import OpenModel
from gpt_kit_hf.pages.work import Stop

Json: TypeAlias = dict[str, Any]

ATTENTION_TOKENS = 128  # of the beginning of a text; what follows does not change it
LENS_TOKENS = 12
MOST_TOKENS = 8192
_BARS = 24
_DIFFERENCES = 12


def read_view(opened: OpenModel, ids: Sequence[int], stop: Stop = lambda: False) -> Json:
    """Return a text's tokens with their scores and the likeliest alternatives, and what is expected next.

    A text that exceeds the model's context is read in windows; `windows` are the tokens at which one begins anew.
    """
    whole = opened.with_start(ids)
    n_start = len(whole) - len(ids)
    if not whole:
        return {"ids": [], "text": "", "tokens": [], "next": None, "scores": None, "windows": []}
    if len(whole) > MOST_TOKENS:
        raise UsageError(f"the text has {len(whole):,} tokens, and the page shows at most {MOST_TOKENS:,}: shorten it")
    reading = opened.reader.read_windows(whole, stop)
    beliefs, pieces = reading.beliefs, opened.pieces(ids)
    scored = reading.beliefs.next_logprob[:-1]
    n_bytes = sum(opened.text_bytes(ids, pieces)[1 - n_start :])
    scores = None
    if len(scored):
        loss = float(-scored.double().mean())
        scores = {
            "tokens": len(scored),
            "bytes": n_bytes,
            "loss": _number(loss),
            "perplexity": _number(math.exp(min(loss, 700))),
            "bits_per_byte": _number(bits_per_byte(scored, n_bytes)),
        }
    return {
        "ids": list(ids),
        "text": opened.decode(list(ids)),
        "tokens": [token_view(opened, beliefs, n + n_start, ids[n], pieces[n]) for n in range(len(ids))],
        "next": belief_view(opened, beliefs, len(whole) - 1),
        "scores": scores,
        "windows": [place - n_start for place in _restarts(opened, len(whole))],
    }


def token_view(opened: OpenModel, beliefs: Beliefs, place: int, token: int, piece: bytes) -> Json:
    """Return the token at a place of the text that was read, and what was expected there."""
    shown = {
        "id": token,
        "text": piece.decode("utf-8", "backslashreplace"),
        "special": token in opened.special_ids,
        "logprob": None,
        "rank": None,
        "expected": None,
    }
    if place > 0:
        shown["logprob"] = _number(float(beliefs.next_logprob[place - 1]))
        shown["rank"] = int(beliefs.next_rank[place - 1])
        shown["expected"] = belief_view(opened, beliefs, place - 1)
    return shown


def belief_view(opened: OpenModel, beliefs: Beliefs, place: int) -> Json:
    """Return what is expected after the token at a place: the entropy, and the likeliest [id, text, logprob]."""
    ids, logprobs = beliefs.top_ids[place].tolist(), beliefs.top_logprobs[place].tolist()
    top = [[token, opened.spell(token), _number(value)] for token, value in zip(ids, logprobs, strict=True)]
    return {"entropy": _number(float(beliefs.entropy[place])), "top": top}


def sampling_view(
    opened: OpenModel, ids: Sequence[int], *, temperature: float, top_k: int | None, top_p: float
) -> Json:
    """Return the likeliest next tokens, [id, text, probability before, after], and what is cut."""
    logits = opened.reader.read_windows(opened.with_start(ids)).logits
    sampled = sampling_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    best = sampled.before.topk(min(_BARS, len(sampled.before)))
    bars = [
        [token, opened.spell(token), before, float(sampled.after[token])]
        for token, before in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    entropies = [float(torch.special.entr(each).sum()) for each in (sampled.before, sampled.after)]
    return {
        "bars": bars,
        "kept": sampled.n_kept,
        "cut": sampled.cut,
        "vocabulary": len(sampled.before),
        "entropy_before": entropies[0],
        "entropy_after": entropies[1],
    }


def choose_next(
    opened: OpenModel,
    whole: Sequence[int],
    generator: torch.Generator,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> int:
    """Return the next token of a text, sampled; `whole` are all ids, with that which begins the text."""
    logits = opened.reader.read(whole).logits
    after = sampling_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p).after
    return int(torch.multinomial(after, num_samples=1, generator=generator))


def added_view(opened: OpenModel, whole: Sequence[int], n_text: int) -> Json:
    """Return the last token of a text, what is expected after it, and the text of the last `n_text` ids."""
    beliefs, text_ids = opened.reader.read(whole).beliefs, list(whole[len(whole) - n_text :])
    piece = opened.pieces(text_ids[-9:])[-1]  # spelled after the tokens before it
    return {
        "token": token_view(opened, beliefs, len(whole) - 1, whole[-1], piece),
        "next": belief_view(opened, beliefs, len(whole) - 1),
        "text": opened.decode(text_ids),
    }


def attention_view(opened: OpenModel, ids: Sequence[int], layer: int, head: int) -> Json:
    """Return the weights of one head as rows of a triangle, and all heads of the layer in 256 steps."""
    if opened.no_attention is not None:
        raise UsageError(opened.no_attention)
    whole = opened.with_start(ids)
    n_start = len(whole) - len(ids)
    shown = whole[: min(ATTENTION_TOKENS, opened.reader.context_length or ATTENTION_TOKENS)]
    if not shown:
        raise UsageError("the text is empty")
    weights = opened.attention(shown)  # (L, H, T, T)
    n_layers, n_heads = weights.shape[:2]
    if not (0 <= layer < n_layers and 0 <= head < n_heads):
        raise UsageError(f"layer={layer} and head={head}: from 0 to below {n_layers} and {n_heads}")
    rows = weights[layer, head].tolist()
    in_steps = (weights[layer] * 255).round().to(torch.uint8)  # (H, T, T)
    pieces = opened.pieces(ids[: len(shown) - n_start])
    return {
        "tokens": [*_start_text(opened, n_start), *(piece.decode("utf-8", "backslashreplace") for piece in pieces)],
        "layers": n_layers,
        "heads": n_heads,
        "weights": [[round(value, 7) for value in row[: n + 1]] for n, row in enumerate(rows)],
        "overview": base64.b64encode(in_steps.numpy().tobytes()).decode(),
        "left_out": len(whole) - len(shown),
    }


def lens_view(opened: OpenModel, ids: Sequence[int], position: int) -> Json:
    """Return what each layer would say after the tokens up to a position, 0 for the first token of the text."""
    if opened.lens is None:
        raise UsageError(opened.no_lens or "no logit lens")
    whole = opened.with_start(ids)
    n_start = len(whole) - len(ids)
    if not 0 <= position + n_start < len(whole):
        raise UsageError(f"position={position}: from {-n_start} to below {len(ids)}")
    stop = position + n_start + 1
    begin = opened.reader.window_start(len(whole), stop - 1)
    places = range(max(begin, stop - LENS_TOKENS), stop)
    lens = opened.lens(whole[begin:stop], [place - begin for place in places])
    texts = [*_start_text(opened, n_start), *(each.decode("utf-8", "backslashreplace") for each in opened.pieces(ids))]
    return {
        "columns": [
            {"text": texts[n], "next": texts[n + 1] if n + 1 < len(texts) else None, "next_id": _at(whole, n + 1)}
            for n in places
        ],
        "layers": [_lens_row(opened, *row) for row in zip(lens.top_ids, lens.top_logprobs, strict=True)],
    }


def _lens_row(opened: OpenModel, ids: Tensor, logprobs: Tensor) -> list[list[list[Any]]]:
    """(P, K) and (P, K) -> for each position the likeliest [id, text, logprob]."""
    return [
        [[token, opened.spell(token), _number(value)] for token, value in zip(*cell, strict=True)]
        for cell in zip(ids.tolist(), logprobs.tolist(), strict=True)
    ]


def compare_view(a: OpenModel, b: OpenModel, text: str, stop: Stop = lambda: False) -> Json:
    """Return the pieces of a text with the log-probabilities of two models, and where they differ most."""
    sides = [_Side(opened, text, stop) for opened in (a, b)]
    data = b"".join(sides[0].pieces)
    try:
        pieces = common_pieces(data, sides[0].lengths, sides[0].logprobs, sides[1].lengths, sides[1].logprobs)
    except ValueError:
        reason = "the tokenizers of the two models change this text, each in another way: it cannot be aligned"
        raise UsageError(reason) from None
    order = {piece: n for n, piece in enumerate(pieces)}
    shown = [
        {
            "text": data[piece.start : piece.stop].decode("utf-8", "backslashreplace"),
            "a": _number(piece.logprob_a),
            "b": _number(piece.logprob_b),
            "tokens": [len(piece.a), len(piece.b)],
        }
        for piece in pieces
    ]
    most = [
        {
            "piece": order[piece],
            "difference": _number(piece.difference),
            "expected": [side.expected(tokens.start) for side, tokens in zip(sides, (piece.a, piece.b), strict=True)],
        }
        for piece in most_different(pieces, _DIFFERENCES)
    ]
    totals = [side.totals() for side in sides]
    return {"pieces": shown, "most": most, "totals": totals}


class _Side:
    """One of two models that are compared on a text."""

    def __init__(self, opened: OpenModel, text: str, stop: Stop) -> None:
        ids = opened.encode(text)
        whole = opened.with_start(ids)
        self._n_start = len(whole) - len(ids)
        if not ids:
            raise UsageError("the text is empty")
        self._opened, self._reading = opened, opened.reader.read_windows(whole, stop)
        self.pieces = opened.pieces(ids)
        self.lengths = [len(piece) for piece in self.pieces]
        scored = self._reading.beliefs.next_logprob[:-1].tolist()
        # Without a token before it, the first one is not scored, and costs nothing here.
        self.logprobs = scored if self._n_start else [0.0, *scored]
        self._n_bytes = sum(opened.text_bytes(ids, self.pieces)[1 - self._n_start :])
        self._n_tokens = len(ids)

    def expected(self, n: int) -> Json | None:
        """Return what the model expected at a token."""
        place = n + self._n_start - 1
        return None if place < 0 else belief_view(self._opened, self._reading.beliefs, place)

    def totals(self) -> Json:
        scored = self._reading.beliefs.next_logprob[:-1]
        return {
            "tokens": self._n_tokens,
            "loss": _number(float(-scored.double().mean())) if len(scored) else None,
            "bits_per_byte": _number(bits_per_byte(scored, self._n_bytes)),
        }


def _restarts(opened: OpenModel, n_ids: int) -> list[int]:
    """Return the places of the tokens that are expected from one token only, as a window begins before them."""
    length = opened.reader.context_length or n_ids
    places = range(length, n_ids - 1, length)
    return [place + 1 for place in places if opened.reader.window_start(n_ids, place) == place]


def _start_text(opened: OpenModel, n_start: int) -> list[str]:
    return [opened.spell(opened.start_id)] if n_start and opened.start_id is not None else []


def _at(ids: Sequence[int], n: int) -> int | None:
    return ids[n] if n < len(ids) else None


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
