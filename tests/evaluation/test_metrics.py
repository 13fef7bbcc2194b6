"""Scores against sums by hand."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
import torch

from gpt_kit_hf import (
    DataError,
    Evaluation,
    GPTModel,
    TokenStream,
    UsageError,
    create_model_config,
    evaluate_stream,
    get_encoding,
    train_bpe,
)
from gpt_kit_hf.errors import StoppedError
from gpt_kit_hf.evaluation.metrics import (
    _in_step,
    byte_counts,
    gzip_bits_per_byte,
    token_byte_lengths,
    unigram_bits_per_byte,
)
from gpt_kit_hf.evaluation.windows import DocumentWindows
from gpt_kit_hf.model.losses import Batch

ENCODING = get_encoding("bytes")
END = 256
TEXT = "Now is the winter of our discontent, made glorious summer by this sun of York. " * 3


def tiny_model() -> GPTModel:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 257, "max_position_embeddings": 32}
    # Weights large enough that a token's context changes its loss.
    return GPTModel(create_model_config("nano-xs", initializer_range=0.3, dropout=0.2, **shape))


def random_documents(seed: int) -> tuple[TokenStream, list[np.ndarray]]:
    """Documents of 0 to 70 tokens, most with EOS, in chunks that do not follow the documents."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 256, int(rng.integers(0, 70))) for _ in range(9)]
    texts[int(rng.integers(9))] = rng.integers(0, 256, 45)
    with_end = [np.append(text, END) if rng.random() < 0.8 else text for text in texts]
    flat, cut = np.concatenate(with_end), int(rng.integers(1, 40))
    starts = np.cumsum([0, *map(len, with_end)])[:-1]
    return TokenStream([flat[:cut], flat[cut:]], starts.astype(np.int64)), texts


def score(model: GPTModel, stream: TokenStream, **options: object) -> Evaluation:
    chosen: dict = {"max_length": 20, "stride": 20, "batch_size": 4, "end_of_text": END} | options
    return evaluate_stream(model, stream, token_byte_lengths(ENCODING), **chosen)


def by_hand(model: GPTModel, texts: list[np.ndarray], max_length: int, stride: int) -> tuple[float, int]:
    """Each token of each text by one pass over what a sliding window shows of the text before it."""
    total, tokens = 0.0, 0
    for text in texts:
        whole = torch.tensor([END, *text.tolist()])
        for target in range(1, len(whole)):
            # Windows read from 0, stride, 2 * stride, ...; the last one ends with the text.
            first = max(0, math.ceil((target - max_length) / stride)) * stride
            first = max(0, min(first, len(whole) - 1 - max_length))
            log_probs = model(whole[None, first:target]).logits[0, -1].log_softmax(-1)
            total -= log_probs[whole[target]].item()
            tokens += 1
    return total, tokens


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(("stride", "batch_size"), [(20, 1), (20, 16), (7, 3), (1, 50)])
def test_each_token_is_scored_once_with_the_context_that_the_stride_allows(
    stride: int, batch_size: int, padding_side: str, seed: int
) -> None:
    model = tiny_model().train()
    stream, texts = random_documents(seed)
    scored = score(model, stream, stride=stride, batch_size=batch_size, padding_side=padding_side)
    assert model.training
    total, tokens = by_hand(model.eval(), texts, 20, stride)
    assert scored.tokens == scored.text_bytes == tokens  # one byte per token; EOS is not scored
    assert scored.loss == pytest.approx(total / tokens, abs=1e-5)
    assert scored.bits_per_byte == pytest.approx(total / math.log(2) / tokens, abs=1e-5)
    assert scored.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_the_stride_changes_the_score_of_this_model() -> None:
    """The reference above can tell strides apart: with this model they give different scores."""
    model = tiny_model().eval()
    stream, _ = random_documents(0)
    assert abs(score(model, stream, stride=20).loss - score(model, stream, stride=1).loss) > 1e-3


def test_a_limit_takes_windows_from_the_whole_text() -> None:
    ids = np.array([*ENCODING.encode_ordinary("a" * 400 + "b" * 400), END])
    stream = TokenStream([ids], np.zeros(1, np.int64))
    windows = DocumentWindows(stream, end_of_text=END, max_length=20, stride=20)
    chosen = windows.spread(100)
    seen = {int(windows[i][1][0]) for i in chosen.tolist()}
    assert seen == {ord("a"), ord("b")}
    assert score(tiny_model(), stream, max_tokens=100).tokens == 100
    assert score(tiny_model(), stream, max_tokens=9999).tokens == 800


def test_empty_text_and_invalid_arguments_are_refused() -> None:
    ends_only = TokenStream([np.array([END, END])], np.array([0, 1]))
    with pytest.raises(DataError, match="no text to score"):
        score(tiny_model(), ends_only)
    with pytest.raises(UsageError, match="stride must lie between 1 and max_length=20, got 21"):
        score(tiny_model(), random_documents(0)[0], stride=21)
    with pytest.raises(UsageError, match="padding_side 'lefft'; did you mean 'left'"):
        score(tiny_model(), random_documents(0)[0], padding_side="lefft")


def test_evaluation_leaves_the_random_state() -> None:
    model = tiny_model()
    before = torch.random.get_rng_state()
    score(model, random_documents(0)[0])
    assert torch.equal(torch.random.get_rng_state(), before)


class OneProcess:
    """The parts of an Accelerator that a single process uses."""

    device = torch.device("cpu")

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def test_an_evaluation_of_a_sharded_model_that_is_stopped_returns_no_score() -> None:
    """Returning from the loop instead would pass a part of the text for the whole."""
    batch = Batch(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    answers = iter([False, False, True])
    batches = _in_step([batch] * 9, OneProcess(), lambda: next(answers))
    assert [next(batches), next(batches)] == [batch, batch]
    with pytest.raises(StoppedError, match="the evaluation was stopped"):
        next(batches)
    assert list(_in_step([batch] * 3, OneProcess(), lambda: False)) == [batch] * 3


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
