"""Scores against sums by hand."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
import torch

from gpt_kit_hf import GPTModel, TokenStream, create_model_config, evaluate_stream, get_encoding, train_bpe
from gpt_kit_hf.evaluation import byte_counts, gzip_bits_per_byte, token_byte_lengths, unigram_bits_per_byte

ENCODING = get_encoding("bytes")
TEXT = "Now is the winter of our discontent, made glorious summer by this sun of York. " * 3


def stream_of_text(text: str) -> TokenStream:
    ids = [*ENCODING.encode_ordinary(text), 256]
    return TokenStream([np.array(ids, dtype=np.uint16)], np.zeros(1, np.int64))


def tiny_model() -> GPTModel:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 257, "max_position_embeddings": 32}
    # Weights large enough that a token's context changes its loss.
    return GPTModel(create_model_config("nano-xs", initializer_range=0.3, dropout=0.2, **shape))


@pytest.mark.parametrize(("stride", "batch_size"), [(20, 1), (20, 16), (7, 3), (1, 50)])
def test_each_token_is_scored_once_with_the_context_that_the_stride_allows(stride: int, batch_size: int) -> None:
    model, stream, max_length = tiny_model().train(), stream_of_text(TEXT), 20
    scored = evaluate_stream(
        model, stream, token_byte_lengths(ENCODING), max_length=max_length, stride=stride, batch_size=batch_size
    )
    assert model.training
    model.eval()
    ids = torch.from_numpy(stream.read(0, len(stream)))
    total, targets = 0.0, len(ids) - 1
    for target in range(1, len(ids)):
        # The first window scores all its targets, each later one its last `stride`, the last ends with the text.
        first = max(0, math.ceil((target - max_length) / stride)) * stride
        first = min(first, targets - max_length)
        log_probs = model(ids[None, first:target]).logits[0, -1].log_softmax(-1)
        total -= log_probs[ids[target]].item()
    assert scored.tokens == targets
    assert scored.loss == pytest.approx(total / targets, abs=1e-5)
    assert scored.text_bytes == len(TEXT) - 1  # all but the first byte; end of text spells none
    assert scored.bits_per_byte == pytest.approx(total / math.log(2) / (len(TEXT) - 1), abs=1e-5)
    assert scored.perplexity == pytest.approx(math.exp(total / targets), rel=1e-4)


def test_a_limit_takes_windows_from_all_over_the_text() -> None:
    stream = stream_of_text("a" * 400 + "b" * 400)
    lengths = token_byte_lengths(ENCODING)
    scored = evaluate_stream(tiny_model(), stream, lengths, max_length=20, stride=20, batch_size=4, max_windows=5)
    assert 80 < scored.tokens <= 100
    whole = evaluate_stream(tiny_model(), stream, lengths, max_length=20, stride=20, batch_size=4, max_windows=999)
    assert whole.tokens == 800


def test_evaluation_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    evaluate_stream(
        tiny_model().eval(), stream_of_text(TEXT), token_byte_lengths(ENCODING), max_length=8, stride=8, batch_size=4
    )
    model = tiny_model()
    before = torch.random.get_rng_state()
    evaluate_stream(model, stream_of_text(TEXT), token_byte_lengths(ENCODING), max_length=8, stride=8, batch_size=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_baselines_equal_their_formulas() -> None:
    encoding = train_bpe([TEXT * 3], 300)
    train, held = "abcab" * 9 + TEXT, "cabz" + TEXT
    streams = [
        TokenStream([np.array([*encoding.encode_ordinary(text), encoding.n_vocab - 1])], np.zeros(1, np.int64))
        for text in (train, held)
    ]
    counts = [stream.counts(encoding.n_vocab) for stream in streams]
    np.testing.assert_array_equal(byte_counts(counts[0], encoding), np.bincount([*train.encode()], minlength=256))
    share = {b: (train.encode().count(b) + 1) / (len(train) + 256) for b in range(256)}
    expected = -sum(math.log2(share[b]) for b in held.encode()) / len(held)
    assert unigram_bits_per_byte(*counts, encoding) == pytest.approx(expected)
    compressed = len(gzip.compress(held.encode(), compresslevel=9))
    assert gzip_bits_per_byte(streams[1], encoding) == pytest.approx(8 * compressed / len(held))
