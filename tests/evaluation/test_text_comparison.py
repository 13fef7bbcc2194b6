"""The pieces of a text that two tokenizers share, on random cuts."""

from __future__ import annotations

import random

import pytest

from gpt_kit_hf.evaluation.text_comparison import common_pieces, most_different


def random_cut(rng: random.Random, n_bytes: int) -> list[int]:
    """Random lengths of tokens with a sum; some tokens have no bytes."""
    lengths = []
    while (left := n_bytes - sum(lengths)) > 0:
        lengths.append(min(left, rng.choice([0, 1, 1, 2, 3, 7])))
    return lengths + [0] * rng.randrange(2)


def random_text(rng: random.Random, n_bytes: int) -> bytes:
    """Random characters of one to four bytes, of a length in all."""
    text = b""
    while (left := n_bytes - len(text)) > 0:
        text += rng.choice([each for each in "aé€😀" if len(each.encode()) <= left]).encode()
    return text


@pytest.mark.parametrize("seed", range(30))
def test_pieces_end_where_tokens_of_both_end(seed: int) -> None:
    rng = random.Random(seed)
    n_bytes = rng.randrange(1, 40)
    cuts = [random_cut(rng, n_bytes) for _ in range(2)]
    logprobs = [[-rng.random() * 9 for _ in cut] for cut in cuts]
    text = random_text(rng, n_bytes)
    pieces = common_pieces(text, cuts[0], logprobs[0], cuts[1], logprobs[1])
    ends = [{sum(cut[: n + 1]) for n in range(len(cut))} - {0} for cut in cuts]
    characters = {len(text.decode()[:n].encode()) for n in range(len(text.decode()) + 1)}
    assert [piece.stop for piece in pieces] == sorted(ends[0] & ends[1] & characters)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    # Each token is in one piece, in order, and its log-probability is counted there.
    for side, cut in enumerate(cuts):
        tokens = [n for piece in pieces for n in (piece.a, piece.b)[side]]
        assert tokens == list(range(len(cut)))
        for piece in pieces:
            inside = (piece.a, piece.b)[side]
            assert sum(cut[n] for n in inside) == piece.stop - piece.start
            total = (piece.logprob_a, piece.logprob_b)[side]
            assert total == pytest.approx(sum(logprobs[side][n] for n in inside))


def test_equal_tokens_are_pieces_of_their_own() -> None:
    pieces = common_pieces(b"abcdef", [2, 3, 1], [-1.0, -2.0, -3.0], [2, 3, 1], [-1.5, -0.5, -3.0])
    assert [piece.difference for piece in pieces] == [-0.5, 1.5, 0.0]
    assert [piece.start for piece in most_different(pieces, 2)] == [2, 0]


def test_texts_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="spell 4 bytes, and the text has 5"):
        common_pieces(b"abcde", [2, 3], [0.0, 0.0], [4], [0.0])
    assert common_pieces(b"", [], [], [], []) == []
