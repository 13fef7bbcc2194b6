"""The token stream: positions of documents that stay on the disk, and the split, against arrays in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gpt_kit_hf.data.text.tokens import token_stream
from gpt_kit_hf.data.text.tokens.stored_arrays import Pieces, StoredIds
from gpt_kit_hf.data.text.tokens.token_stream import DocumentStarts, TokenStream, join_streams, split_eval
from gpt_kit_hf.data.text.windows import TokenWindows

Ints = npt.NDArray[np.int64]


def stored(array: npt.NDArray[np.generic], file: Path) -> StoredIds:
    array.tofile(file)
    return StoredIds(str(file), 0, array.size, array.dtype)


def stored_stream(rng: np.random.Generator, folder: Path, documents: int) -> tuple[TokenStream, Ints, Ints]:
    """A stream in five files, of which some begin within a document, with its ids and starts as arrays."""
    folder.mkdir()
    lengths = rng.integers(1, 30, documents)
    ids, starts = np.arange(lengths.sum()).astype(np.uint32), np.cumsum(np.append(0, lengths[:-1]))
    cuts = np.append(0, np.sort(rng.choice(np.arange(1, ids.size), 4, replace=False)))
    chunks, parts = [], []
    for number, (first, stop) in enumerate(zip(cuts, np.append(cuts[1:], ids.size), strict=True)):
        chunks.append(stored(ids[first:stop], folder / f"{number}.ids"))
        inside = starts[(first <= starts) & (starts < stop)] - first
        parts.append(stored(inside, folder / f"{number}.starts"))
    return TokenStream(chunks, DocumentStarts(Pieces.whole(parts), cuts, cuts)), ids.astype(np.int64), starts


def plain_split(ids: Ints, starts: Ints, fraction: float, seed: int) -> tuple[list[Ints], list[Ints]]:
    """The documents to train on and to evaluate on, by the definition."""
    documents = np.split(ids, starts[1:])
    left, held = round(ids.size * fraction), dict[int, Ints]()
    for number in np.random.default_rng(seed).permutation(len(documents)).tolist():
        if left:
            held[number] = documents[number][-min(left, documents[number].size) :]
            left -= held[number].size
    trained = [each[: each.size - held[n].size] if n in held else each for n, each in enumerate(documents)]
    return [each for each in trained if each.size], [held[n] for n in sorted(held)]


def check(stream: TokenStream, documents: list[Ints]) -> None:
    """Compare every way of reading with a list of the documents."""
    ids = np.concatenate(documents)
    starts = np.cumsum([0, *(each.size for each in documents)])[:-1]
    np.testing.assert_array_equal(stream.read(0, len(stream)), ids)
    np.testing.assert_array_equal(stream.document_starts, starts)
    counts = [stream.document_starts.count_to(position) for position in range(-1, ids.size + 2)]
    assert counts == np.searchsorted(starts, np.arange(-1, ids.size + 2), side="right").tolist()
    numbers = np.random.default_rng(0).integers(0, starts.size, 20)
    np.testing.assert_array_equal(stream.document_starts[numbers], starts[numbers])
    assert stream.document_starts[-1] == starts[-1]
    assert stream.document_starts[1:3].tolist() == starts[1:3].tolist()
    assert stream.fingerprint() == TokenStream([ids], starts).fingerprint()


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_on_the_disk_is_read_split_and_joined_like_one_in_memory(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    stream, ids, starts = stored_stream(rng, tmp_path / "a", documents=40)
    check(stream, np.split(ids, starts[1:]))
    fraction = float(rng.uniform(0.02, 0.6))
    trained, held = plain_split(ids, starts, fraction, seed)
    both = split_eval(stream, fraction, seed)
    check(both[0], trained)
    check(both[1], held)
    # Once more, of what is left, and joined with another stream.
    again = plain_split(np.concatenate(trained), np.cumsum([0, *map(len, trained)])[:-1], 0.3, seed + 1)
    check(split_eval(both[0], 0.3, seed + 1)[0], again[0])
    other, more, begins = stored_stream(rng, tmp_path / "b", documents=7)
    check(join_streams([both[0], other]), [*trained, *np.split(more, begins[1:])])


def test_counts_of_a_large_stream_are_of_evenly_spaced_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "_BLOCK", 10)
    ids = np.random.default_rng(0).integers(0, 50, 1_003)
    stream = TokenStream([ids[:37], ids[37:]], np.zeros(1, np.int64))
    for at_most in (None, 5_000, 1_003, 900):
        np.testing.assert_array_equal(stream.counts(50, at_most), np.bincount(ids, minlength=50))
    spaced = ids[:1_000].reshape(-1, 10)[::4].ravel()
    np.testing.assert_array_equal(stream.counts(50, 250), np.bincount(np.append(spaced, ids[1_000:]), minlength=50))


@pytest.mark.parametrize("size", [1, 2, 200, 255, 256, 70_000])
def test_documents_are_drawn_as_by_a_permutation(size: int) -> None:
    order = np.arange(size, dtype=np.min_scalar_type(size))
    np.random.default_rng(3).shuffle(order)
    np.testing.assert_array_equal(order, np.random.default_rng(3).permutation(size))


def test_five_million_documents_need_little_memory(tmp_path: Path) -> None:
    """One byte and its EOS each; an array of their positions alone has 40 MB."""
    count = 5_000_000
    ids = stored(np.tile(np.array([97, 256], np.uint16), count), tmp_path / "ids")
    starts = stored(np.arange(0, 2 * count, 2), tmp_path / "starts")
    tracemalloc.start()
    try:
        none = np.zeros(1, np.int64)
        stream = TokenStream([ids], DocumentStarts(Pieces.whole([starts]), none, none))
        train, held_out = split_eval(stream, 50_000 / len(stream), seed=0)
        windows = TokenWindows(train, 64, 64, packing=True)
        input_ids, targets, positions = windows[len(windows) // 2]
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(held_out) == 50_000
    assert len(train.document_starts) == count - 25_000
    assert input_ids.tolist() == [97, 256] * 32
    assert positions.tolist() == [0, 1] * 32
    assert targets.tolist() == [256, -100] * 32
    assert kept < 6 << 20
    assert most < 64 << 20
