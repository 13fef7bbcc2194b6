"""Windows, order and batches against naive references."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DynamicCache

from gpt_kit_hf import GPTModel, create_model_config
from gpt_kit_hf.data.order import BatchPlan, PlannedBatches, ShuffledOrder
from gpt_kit_hf.data.text.corpus import prepare_text
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream, reshuffled, split_eval
from gpt_kit_hf.data.text.windows import (
    IGNORED,
    EpochWindows,
    GPTPretrainingDataset,
    TokenWindows,
    collate_windows,
    create_pretraining_dataloader,
)
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.evaluation.invariance import _flex_attention
from gpt_kit_hf.model.losses import summed_batch_loss
from gpt_kit_hf.options.data import TextOptions, WindowOptions
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, get_encoding, save_tokenizer


def random_stream(rng: np.random.Generator, documents: int, longest: int = 40) -> tuple[TokenStream, list[np.ndarray]]:
    """A stream of random documents, cut into pieces that have nothing to do with the documents."""
    texts = [rng.integers(0, 256, size=rng.integers(1, longest)).astype(np.uint16) for _ in range(documents)]
    flat = np.concatenate(texts)
    cuts = np.sort(rng.integers(0, flat.size + 1, size=4))
    starts = np.concatenate(([0], np.cumsum([text.size for text in texts])[:-1]))
    return TokenStream(np.split(flat, cuts), starts), texts


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_reads_as_the_documents_joined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream, texts = random_stream(rng, documents=int(rng.integers(1, 12)))
    flat = np.concatenate(texts)
    assert len(stream) == flat.size
    for _ in range(20):
        start, stop = np.sort(rng.integers(0, flat.size + 1, size=2))
        np.testing.assert_array_equal(stream.read(int(start), int(stop)), flat[start:stop])
    np.testing.assert_array_equal(stream.counts(256), np.bincount(flat, minlength=256))


def test_a_stream_is_a_view_and_its_fingerprint_sees_ids_and_boundaries() -> None:
    ids = np.arange(10, dtype=np.uint16)
    stream = TokenStream([ids[:4], ids[4:]], np.array([0, 4]))
    assert all(np.shares_memory(view, ids) for view in stream.views(2, 8))
    assert stream.fingerprint() == TokenStream([ids], np.array([0, 4])).fingerprint()
    assert stream.fingerprint() != TokenStream([ids], np.array([0, 5])).fingerprint()
    assert stream.fingerprint() != TokenStream([ids[::-1].copy()], np.array([0, 4])).fingerprint()


@pytest.mark.parametrize("seed", range(30))
def test_windows_equal_a_naive_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream, texts = random_stream(rng, documents=8)
    flat = np.concatenate(texts).astype(np.int64)
    max_length = int(rng.integers(1, min(12, flat.size - 1)))
    stride = int(rng.integers(1, max_length + 1))
    windows = TokenWindows(stream, max_length, stride, keep_tail=False)
    naive = [flat[i : i + max_length + 1] for i in range(0, flat.size - max_length, stride)]
    assert len(windows) == len(naive)
    for (inputs, targets), expected in zip((windows[i] for i in range(len(windows))), naive, strict=True):
        assert inputs.dtype == targets.dtype == torch.int64
        np.testing.assert_array_equal(inputs, expected[:-1])
        np.testing.assert_array_equal(targets, expected[1:])


@pytest.mark.parametrize("seed", range(30))
def test_every_target_is_trained_exactly_once_at_the_stride_of_max_length(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream, texts = random_stream(rng, documents=8)
    flat = np.concatenate(texts).astype(np.int64)
    max_length = int(rng.integers(1, min(12, flat.size - 1)))
    # Ids that name their own position show which target each one is.
    positions = TokenStream([np.arange(flat.size)], stream.document_starts)
    times = np.zeros(flat.size, dtype=int)
    windows = TokenWindows(positions, max_length, max_length)
    for index in range(len(windows)):
        inputs, targets = windows[index]
        trained = targets != IGNORED
        assert torch.equal(targets[trained], inputs[trained] + 1)
        times[targets[trained]] += 1
    assert times[0] == 0
    assert (times[1:] == 1).all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("documents", [1, 2, 30])
def test_the_split_holds_out_its_share_and_loses_nothing(seed: int, documents: int) -> None:
    rng = np.random.default_rng(seed)
    stream, texts = random_stream(rng, documents)
    ids = np.arange(len(stream))
    named = TokenStream([ids], stream.document_starts)
    fraction = float(rng.uniform(0.05, 0.5))
    train, held_out = split_eval(named, fraction, seed)
    kept, held = train.read(0, len(train)), held_out.read(0, len(held_out))
    assert len(held_out) == round(len(stream) * fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate((kept, held))), ids)
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()
    # At most one document is cut, and both parts know where documents begin.
    document = np.repeat(np.arange(documents), [text.size for text in texts])
    assert len(set(document[kept]) & set(document[held])) <= 1
    for part, positions in ((train, kept), (held_out, held)):
        assert set(part.document_starts) == {0, *(np.flatnonzero(np.diff(document[positions])) + 1)} or not len(part)


def test_one_document_is_cut_at_its_end() -> None:
    stream = TokenStream([np.arange(100)], np.zeros(1, np.int64))
    train, held_out = split_eval(stream, 0.1, seed=3)
    np.testing.assert_array_equal(train.read(0, 90), np.arange(90))
    np.testing.assert_array_equal(held_out.read(0, 10), np.arange(90, 100))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_continues_at_any_step(workers: int) -> None:
    stream = TokenStream([np.arange(200)], np.zeros(1, np.int64))
    windows = TokenWindows(stream, 4, 4)
    plan = BatchPlan(order=ShuffledOrder(samples=len(windows), seed=1), batch_size=6, micro_batch_size=4)

    def load(first: int) -> list[torch.Tensor]:
        generator = torch.Generator()
        loader = DataLoader(
            windows, batch_sampler=PlannedBatches(plan, first, 9), num_workers=workers, generator=generator
        )
        return [inputs for inputs, _ in loader]

    whole, rest = load(0), load(5)
    assert len(whole) == 9 * plan.micro_steps
    assert all(torch.equal(a, b) for a, b in zip(whole[5 * plan.micro_steps :], rest, strict=True))


def test_the_kit_dataset_slides_over_a_text() -> None:
    encoding = get_encoding("bytes")
    dataset = GPTPretrainingDataset("abcdefghij", encoding, max_length=4, stride=2)
    rows = [(encoding.decode(x.tolist()), encoding.decode(y.tolist())) for x, y in (dataset[i] for i in range(3))]
    assert rows == [("abcd", "bcde"), ("cdef", "defg"), ("efgh", "fghi")]
    assert len(dataset) == 3
    with pytest.raises(IndexError):
        dataset[3]


def test_the_kit_loader_is_deterministic_and_leaves_the_random_state() -> None:
    text = "To be, or not to be, that is the question. " * 20
    before = torch.random.get_rng_state()
    loaders = [
        create_pretraining_dataloader(
            text, batch_size=3, max_length=8, stride=4, tokenizer=get_encoding("bytes"), seed=s
        )
        for s in (1, 1, 2)
    ]
    epochs = [[inputs for inputs, _ in loader] for loader in loaders]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))
    inputs, targets = next(iter(loaders[0]))
    assert inputs.shape == targets.shape == (3, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_skips_or_stands_is_refused(stride: int) -> None:
    with pytest.raises(UsageError, match=f"stride must lie between 1 and max_length=8, got {stride}"):
        WindowOptions(max_length=8, stride=stride)
    with pytest.raises(UsageError, match="stride must lie"):
        GPTPretrainingDataset("abcdefghijklmn", get_encoding("bytes"), 8, stride)


def test_a_text_shorter_than_a_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match="the text has 8 tokens, fewer than one window: max_length=8 needs 9"):
        GPTPretrainingDataset("abcdefgh", get_encoding("bytes"), 8, 4)
    assert len(GPTPretrainingDataset("abcdefghi", get_encoding("bytes"), 8, 4)) == 1
    with pytest.raises(DataError, match="gives 1 windows, fewer than one batch of 4"):
        create_pretraining_dataloader("abcdefghi", max_length=8, stride=4, tokenizer=get_encoding("bytes"))


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size=9 must be divisible by the number of processes, 2"):
        BatchPlan(order=ShuffledOrder(samples=31, seed=0), batch_size=9, micro_batch_size=3, num_processes=2)


# --- packing


def naive_packed(flat: np.ndarray, document: np.ndarray, start: int, length: int) -> tuple[list[int], ...]:
    """A packed window, token by token: (inputs, targets, position_ids)."""
    inputs: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    for place in range(start, start + length):
        goes_on = place > start and document[place] == document[place - 1]
        positions.append(positions[-1] + 1 if goes_on else 0)
        inputs.append(int(flat[place]))
        targets.append(int(flat[place + 1]) if document[place + 1] == document[place] else IGNORED)
    return inputs, targets, positions


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("longest", [2, 5, 60])
def test_packed_windows_equal_a_naive_reference(seed: int, longest: int) -> None:
    rng = np.random.default_rng(seed)
    stream, texts = random_stream(rng, documents=12, longest=longest)
    flat = np.concatenate(texts).astype(np.int64)
    document = np.repeat(np.arange(12), [text.size for text in texts])
    max_length = int(rng.integers(1, min(14, flat.size - 1)))
    stride = int(rng.integers(1, max_length + 1))
    packed = TokenWindows(stream, max_length, stride, packing=True)
    plain = TokenWindows(stream, max_length, stride)
    starts = [*range(0, flat.size - max_length, stride)]
    last = flat.size - 1 - max_length
    starts += [last] if starts[-1] < last else []
    assert len(packed) == len(plain) == len(starts)
    for index, start in enumerate(starts):
        inputs, targets, positions = packed[index]
        expected = naive_packed(flat, document, start, max_length)
        assert positions.dtype == torch.int64
        assert inputs.tolist() == expected[0]
        assert positions.tolist() == expected[2]
        # A target is trained where the window without packing trains it and the document goes on.
        unpacked = plain[index][1].tolist()
        both = [t if u != IGNORED else IGNORED for t, u in zip(expected[1], unpacked, strict=True)]
        assert targets.tolist() == both


@pytest.mark.parametrize("seed", range(10))
def test_packed_windows_train_all_but_first_tokens_exactly_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stream, texts = random_stream(rng, documents=12)
    size = sum(text.size for text in texts)
    positions = TokenStream([np.arange(size)], stream.document_starts)
    max_length = int(rng.integers(1, min(30, size - 1)))
    times = np.zeros(size, int)
    for index in range(len(windows := TokenWindows(positions, max_length, max_length, packing=True))):
        targets = windows[index][1]
        times[targets[targets != IGNORED]] += 1
    first = np.zeros(size, bool)
    first[stream.document_starts] = True
    np.testing.assert_array_equal(times, ~first)


def uncompiled(attention: str) -> AbstractContextManager[None]:
    return _flex_attention(compiled=False) if attention == "flex_attention" else nullcontext()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's flex attention about torch itself
@pytest.mark.parametrize("cache", ["none", "default", "dynamic"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_the_packed_loss_is_that_of_the_documents_alone(attention: str, cache: str) -> None:
    """Each piece of a document inside a window by itself, eager and without packing, against the packed batch."""
    rng = np.random.default_rng(5)
    stream, _ = random_stream(rng, documents=14, longest=30)
    config = create_model_config("nano-xs", vocab_size=256, n_layer=2, n_head=2, n_embd=32, max_position_embeddings=32)
    torch.manual_seed(3)
    model = GPTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5)  # so that a token seen or not seen moves the loss
    windows = TokenWindows(stream, 24, 24, packing=True)
    batch = collate_windows([windows[index] for index in range(len(windows))])
    assert batch.position_ids is not None
    arguments: dict[str, Any] = {
        "none": {"use_cache": False}, "default": {}, "dynamic": {"past_key_values": DynamicCache(config=config)}
    }[cache]  # fmt: skip
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected, pieces = 0.0, 0
        for inputs, targets, positions in zip(batch.input_ids, batch.targets, batch.position_ids, strict=True):
            bounds = [*torch.nonzero(positions == 0).flatten().tolist(), 24]
            for first, last in pairwise(bounds):
                logits = model(inputs[None, first:last], use_cache=False).logits[0]
                expected += float(cross_entropy(logits, targets[first:last], reduction="sum", ignore_index=IGNORED))
                pieces += 1
        assert pieces > len(windows) + 5
        model.set_attn_implementation(attention)
        with uncompiled(attention):
            logits = model(batch.input_ids, position_ids=batch.position_ids, **arguments).logits
            mixed = model(batch.input_ids, use_cache=False).logits
            if cache == "none":
                scored = summed_batch_loss(batch.input_ids, batch.targets, model, position_ids=batch.position_ids)
                assert float(scored.loss_sum) == pytest.approx(expected, rel=1e-5)
    losses = [
        float(cross_entropy(each.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=IGNORED))
        for each in (logits, mixed)
    ]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert abs(losses[1] - expected) > 1e-3 * expected, "documents that see each other would score alike"


# --- where documents end


def loader_ids(text: str, tokenizer: Any, **options: Any) -> list[int]:
    """All ids of the text, from windows of two."""
    windows = GPTPretrainingDataset(text, tokenizer, 1, 1, **options)
    stream = windows.stream
    return stream.read(0, len(stream)).tolist()


@pytest.mark.parametrize(
    "text",
    [
        f"one\n{EOS_TOKEN}\ntwo\n",
        f"one{EOS_TOKEN}\r\ntwo{EOS_TOKEN}",
        f"\n{EOS_TOKEN}\none\n\n{EOS_TOKEN} \n{EOS_TOKEN}\n two\n{EOS_TOKEN}\n",
        "one two\n",
    ],
)
def test_the_loader_ends_documents_where_a_run_does(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    options = TextOptions(text_files=[str(tmp_path / "a.txt")])
    stream, _, _ = prepare_text(options, get_encoding("bytes"))
    ids = stream.read(0, len(stream)).tolist()
    ended = text.rstrip().endswith(EOS_TOKEN)
    assert loader_ids(text, get_encoding("bytes")) == (ids if ended else ids[:-1])


def test_marks_and_separators_are_read_as_the_loader_is_asked_to(tmp_path: Path) -> None:
    encoding = get_encoding("bytes")
    text = f"GPT {EOS_TOKEN} ends"
    with pytest.warns(UserWarning, match=r"stands 1 times within a line of the text.*document_separator="):
        assert loader_ids(text, encoding) == [*text.encode()]
    assert loader_ids(text, encoding, eos_in_text="keep") == [*text.encode()]
    assert loader_ids(text, encoding, document_separator=EOS_TOKEN) == [*b"GPT ", 256, *b" ends"]
    with pytest.raises(DataError, match="is written in the text"):
        loader_ids(text, encoding, eos_in_text="error")


def test_a_tokenizer_of_transformers_reads_marks_as_its_encoding_does(tmp_path: Path) -> None:
    encoding = get_encoding("bytes")
    save_tokenizer(encoding, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = f"one\n{EOS_TOKEN}\ntwo {EOS_TOKEN} two"
    with pytest.warns(UserWarning, match="within a line"):
        ids = loader_ids(text, tokenizer)
    assert ids == [*b"one\n", 256, *f"two {EOS_TOKEN} two".encode()]


@pytest.mark.parametrize("seed", range(20))
def test_a_reshuffled_stream_has_the_same_documents_from_another_token_on(seed: int) -> None:
    stream, texts = random_stream(np.random.default_rng(seed), documents=1 + seed % 7)
    assert reshuffled(stream, seed, 0) is stream
    found = reshuffled(stream, seed, 3)
    np.testing.assert_array_equal(found.read(0, len(found)), reshuffled(stream, seed, 3).read(0, len(found)))
    parts = np.split(found.read(0, len(found)), np.asarray(found.document_starts)[1:])
    wanted = {text.tobytes() for text in map(np.int64, texts)}
    whole = [part for part in parts if part.tobytes() in wanted]
    assert len(whole) >= len(texts) - 1
    if len(whole) < len(texts):  # one is cut: it begins in the last part and ends in the first
        assert np.append(parts[-1], parts[0]).tobytes() in wanted
        assert len(parts) == len(texts) + 1
    firsts = {tuple(reshuffled(stream, seed, epoch).read(0, 4)) for epoch in range(1, 9)}
    assert len(firsts) > 1


def test_each_epoch_of_reshuffled_windows_has_each_target_once() -> None:
    rng = np.random.default_rng(0)
    streams = [random_stream(rng, documents=9)[0] for _ in range(2)]
    windows = EpochWindows(streams, WindowOptions(max_length=8), seed=5)
    fixed = [window for stream in streams for window in TokenWindows(stream, 8, 8)]
    epochs = [[windows[epoch * len(windows) + index] for index in range(len(windows))] for epoch in range(3)]
    for one, other in zip(epochs[0], fixed, strict=True):
        assert all(map(torch.equal, one, other))
    for epoch in epochs:
        for source, size in enumerate(windows.sizes):
            own = epoch[sum(windows.sizes[:source]) :][:size]
            targets = torch.cat([target[target != IGNORED] for _, target in own])
            # All but the token that comes first, which no window has as a target.
            counts = streams[source].counts(256) - np.bincount(targets, minlength=256)
            assert (counts >= 0).all()
            assert counts.sum() == 1
    inputs = [torch.stack([window[0] for window in epoch]) for epoch in epochs]
    assert not torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[1], inputs[2])
    # Any order of reading gives the same, as the order of a run does when it is resumed.
    for index in rng.integers(0, 3 * len(windows), 200).tolist():
        epoch, inside = divmod(index, len(windows))
        assert all(map(torch.equal, windows[index], epochs[epoch][inside]))


def test_windows_of_a_later_epoch_need_reshuffling() -> None:
    stream, _ = random_stream(np.random.default_rng(0), documents=9)
    windows = EpochWindows([stream], WindowOptions(max_length=8, reshuffle=False), seed=0)
    with pytest.raises(IndexError, match=f"window {len(windows)} of {len(windows)}"):
        windows[len(windows)]
