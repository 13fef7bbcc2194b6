"""Two models on one text: where they differ, also if their tokenizers cut the text differently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class Piece(NamedTuple):
    """A shortest part of the text that is whole characters, and whole tokens in both models.

    Its log-probabilities are in nats.
    `start` and `stop` count bytes of the text; `a` and `b` are ranges of the models' tokens.
    """

    start: int
    stop: int
    a: range
    b: range
    logprob_a: float
    logprob_b: float

    @property
    def difference(self) -> float:
        """By how many nats model b finds the piece likelier than model a."""
        return self.logprob_b - self.logprob_a


def common_pieces(
    text: bytes,
    lengths_a: Sequence[int],
    logprobs_a: Sequence[float],
    lengths_b: Sequence[int],
    logprobs_b: Sequence[float],
) -> list[Piece]:
    """Cut a text where a character and tokens of both models end.

    Args:
        text: the text, in UTF-8.
        lengths_a: bytes of each token of model a, in order; their sum is the length of the text.
        logprobs_a: the log-probability of each token; they are added within a piece.
        lengths_b: as lengths_a.
        logprobs_b: as logprobs_a.

    Returns:
        The pieces in order. Tokens of no bytes, such as special ones, belong to the piece before them.

    Raises:
        ValueError: the tokens of a model spell a text of another length.

    """
    ends_a, ends_b = list(accumulate(lengths_a)), list(accumulate(lengths_b))
    for ends in (ends_a, ends_b):
        if (ends or [0])[-1] != len(text):
            raise ValueError(f"the tokens spell {(ends or [0])[-1]} bytes, and the text has {len(text)}")
    # The last token that ends at a place ends the piece.
    last_a, last_b = ({end: n + 1 for n, end in enumerate(ends)} for ends in (ends_a, ends_b))
    pieces, start, a, b = [], 0, 0, 0
    for stop in sorted(last_a.keys() & last_b.keys()):
        # Tokens of no bytes at the start stay with the first piece.
        if stop == 0 or (stop < len(text) and text[stop] & 0xC0 == 0x80):  # within a character
            continue
        tokens_a, tokens_b = range(a, last_a[stop]), range(b, last_b[stop])
        logprob_a, logprob_b = sum(logprobs_a[n] for n in tokens_a), sum(logprobs_b[n] for n in tokens_b)
        pieces.append(Piece(start, stop, tokens_a, tokens_b, logprob_a, logprob_b))
        start, a, b = stop, tokens_a.stop, tokens_b.stop
    return pieces


def most_different(pieces: Sequence[Piece], n: int) -> list[Piece]:
    """Return the pieces on which the models differ most, the greatest difference first."""
    return sorted(pieces, key=lambda piece: -abs(piece.difference))[:n]
