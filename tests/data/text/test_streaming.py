"""Windows of streamed text: the same for any processes and workers, and resumed anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from gpt_kit_hf.data.order import BatchPlan, StreamOrder
from gpt_kit_hf.data.text import streaming
from gpt_kit_hf.data.text.shards import CHUNK_BYTES, file_shards
from gpt_kit_hf.data.text.sources import train_sources
from gpt_kit_hf.data.text.streaming import StreamBatches, StreamShard, stream_shard_count
from gpt_kit_hf.data.text.tokens.token_stream import TokenStream
from gpt_kit_hf.data.text.windows import IGNORED, TokenWindows
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import TextOptions, WindowOptions
from gpt_kit_hf.tokenization.encodings import get_encoding

ENCODING = get_encoding("bytes")
END = ENCODING.eot_token
BATCH, CHUNK = 8, 16


def write_texts(folder: Path, seed: int = 0) -> list[str]:
    """Files of random length, some blank, of which one is long enough to be cut."""
    rng = np.random.default_rng(seed)
    names = []
    for index in range(12):
        words = rng.integers(97, 123, size=(int(rng.integers(1, 400)), 5)).astype(np.uint8)
        text = "\n".join(bytes(word).decode() for word in words) if index != 5 else "  \n"
        name = folder / f"{index:02}.txt"
        name.write_text(text if index != 7 else text * 20)
        names.append(str(name))
    return names


def file_stream_shards(
    folder: Path, *, batch_size: int = BATCH, packing: bool = False, stride: int | None = None
) -> list[StreamShard]:
    files = sorted(folder.glob("*.txt"))
    shards = file_shards(files, column="text", separator=None, may_cut=True, shard_bytes=2_000)
    return stream_shards_of(shards, batch_size, packing, stride)


def dataset_stream_shards(folder: Path) -> list[StreamShard]:
    """Stream shards of a streamed dataset of JSON lines, eight files of them."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for index in range(8):
        rows = [json.dumps({"text": "w" * int(rng.integers(1, 60)) + f" {index} {row}"}) for row in range(30)]
        (folder / f"{index}.jsonl").write_text("\n".join(rows))
    options = TextOptions(dataset_name=str(folder), streaming=True, eval_files=["unread.txt"])
    return stream_shards_of(train_sources(options)[0][1].streamed_shards(may_cut=True), BATCH)


def stream_shards_of(
    shards: Any, batch_size: int, packing: bool = False, stride: int | None = None
) -> list[StreamShard]:
    count = stream_shard_count(len(shards), batch_size)
    bounds = [number * len(shards) // count for number in range(count + 1)]
    return [
        StreamShard(
            shards=tuple(shards[bounds[number] : bounds[number + 1]]),
            encoding=ENCODING,
            windows=WindowOptions(max_length=24, packing=packing, stride=stride),
            shuffle_windows=CHUNK,
            seed=number,
        )
        for number in range(count)
    ]


def plan(processes: int = 1, rank: int = 0, micro: int = BATCH) -> BatchPlan:
    return BatchPlan(
        order=StreamOrder(),
        batch_size=BATCH,
        micro_batch_size=micro,
        num_processes=processes,
        process_index=rank,
    )


def run(stream_shards: list[StreamShard], which: BatchPlan, steps: range, states: Any = None, workers: int = 0) -> Any:
    """Return each step's micro-batches, and the states after it as they come back from JSON."""
    batches = StreamBatches(stream_shards, which, num_workers=workers, pin_memory=False)
    given = batches.steps(steps.start, steps.stop, states or {})
    found = []
    for _ in steps:
        step = [next(given) for _ in range(which.micro_steps)]
        after = json.loads(json.dumps(batches.states))
        found.append((step, {int(number): state for number, state in after.items()}))
    return found


def rows(step: list[Batch]) -> list[bytes]:
    return [part[row].numpy().tobytes() for batch in step for part in (batch.input_ids,) for row in range(len(part))]


@pytest.mark.parametrize("source", ["files", "dataset"])
def test_a_step_is_the_same_for_any_processes_workers_and_micro_batches(source: str, tmp_path: Path) -> None:
    write_texts(tmp_path)
    stream_shards = file_stream_shards(tmp_path) if source == "files" else dataset_stream_shards(tmp_path / "rows")
    assert len(stream_shards) == 8
    alone = [rows(step) for step, _ in run(stream_shards, plan(), range(12))]
    for processes, workers, micro in ((1, 2, 3), (2, 0, 4), (2, 2, 1), (4, 1, 2), (8, 0, 1)):
        shares = [
            run(stream_shards, plan(processes, rank, micro), range(12), workers=workers) for rank in range(processes)
        ]
        for step in range(12):
            together = [row for share in shares for row in rows(share[step][0])]
            assert sorted(together) == sorted(alone[step]), (processes, workers, micro, step)


def test_windows_of_a_stream_shard_equal_those_of_its_text(tmp_path: Path) -> None:
    """Against `TokenWindows` over the stream shard's documents, pass after pass, in the order of the text."""
    write_texts(tmp_path)
    for packing, stride in ((False, None), (True, None), (False, 7)):
        stream_shard = file_stream_shards(tmp_path, packing=packing, stride=stride)[0]
        ids, starts = [], []
        for _ in range(3):
            inside = False
            for shard in stream_shard.shards:
                for text, ends, _ in shard.chunks():
                    if not inside:
                        starts.append(len(ids))
                    ids += [*text.encode(), *([END] * ends)]
                    inside = not ends
        naive = TokenWindows(
            TokenStream([np.array(ids)], np.array(starts)), 24, stride or 24, packing=packing, keep_tail=False
        )
        wanted = [tuple(part.tolist() for part in naive[index]) for index in range(CHUNK * 3)]
        reader = stream_shard.samples()
        got = [tuple(part.tolist() for part in next(reader)[0]) for _ in range(CHUNK * 3)]
        for first in range(0, CHUNK * 3, CHUNK):  # shuffled within a chunk, never across
            assert sorted(got[first : first + CHUNK]) == sorted(wanted[first : first + CHUNK])
        assert got != wanted


def test_packed_windows_restart_where_documents_begin(tmp_path: Path) -> None:
    write_texts(tmp_path)
    reader = file_stream_shards(tmp_path, packing=True)[0].samples()
    for _ in range(200):
        (inputs, targets, positions), _ = next(reader)
        begins = torch.cat((torch.tensor([True]), inputs[:-1] == END))
        expected, position = [], 0
        for begin in begins.tolist():
            position = 0 if begin else position + 1
            expected.append(position)
        assert positions.tolist() == expected
        assert (targets[inputs == END] == IGNORED).all()
        assert (targets[inputs != END] != IGNORED).all()


def check_resume(stream_shards: list[StreamShard], positions: int, workers: int, steps: int = 60) -> None:
    reference = run(stream_shards, plan(), range(steps))
    rng = np.random.default_rng(0)
    for _ in range(positions):
        at = int(rng.integers(0, steps - 3))
        going_on = run(stream_shards, plan(), range(at + 1, at + 4), reference[at][1], workers)
        for (step, states), (wanted, after) in zip(going_on, reference[at + 1 : at + 4], strict=True):
            assert rows(step) == rows(wanted)
            assert states == after


@pytest.mark.parametrize(("workers", "positions"), [(0, 100), (2, 5)])
@pytest.mark.parametrize("source", ["files", "dataset"])
def test_a_stream_resumes_anywhere(source: str, workers: int, positions: int, tmp_path: Path) -> None:
    write_texts(tmp_path)
    stream_shards = file_stream_shards(tmp_path) if source == "files" else dataset_stream_shards(tmp_path / "rows")
    check_resume(stream_shards, positions, workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_at_a_thousand_places(workers: int, tmp_path: Path) -> None:
    write_texts(tmp_path)
    check_resume(file_stream_shards(tmp_path, stride=9), 1000, workers, steps=400)


def test_resuming_reads_no_more_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    stream_shards = file_stream_shards(tmp_path)
    states = run(stream_shards, plan(), range(150))[-1][1]
    read = []
    encode: Callable[..., Any] = streaming.encodings.encode_documents

    def counted(encoding: Any, parts: Any, where: str) -> Any:
        ids = encode(encoding, parts, where)
        read.append(ids.size)
        return ids

    monkeypatch.setattr(streaming.encodings, "encode_documents", counted)
    run(stream_shards, plan(), range(150, 151), states)
    longest = CHUNK_BYTES if CHUNK_BYTES < 10_000 else 10_000
    assert sum(read) < len(stream_shards) * (CHUNK * 25 + 2 * longest)


def test_a_stream_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(DataError, match="there is no text to train on"):
        run(file_stream_shards(tmp_path), plan(), range(1))


def test_more_processes_than_stream_shards_read_the_batches_of_one(tmp_path: Path) -> None:
    """16 processes over 8 stream shards, and 3 over 2, which they cannot divide: each sample is in one share."""
    write_texts(tmp_path)
    for processes, count, workers in ((16, 8, 0), (3, 2, 0), (12, 8, 2)):
        stream_shards = file_stream_shards(tmp_path)[:count]
        whole = BatchPlan(order=StreamOrder(), batch_size=48, micro_batch_size=48)
        alone = run(stream_shards, whole, range(4))
        shares = [
            run(
                stream_shards,
                replace(whole, micro_batch_size=2, num_processes=processes, process_index=rank),
                range(4),
                workers=workers,
            )
            for rank in range(processes)
        ]
        for step, (batches, states) in enumerate(alone):
            parts = [rows(share[step][0]) for share in shares]
            assert [len(part) for part in parts] == [48 // processes] * processes
            # In the order of the batch: process p has the samples p, p + processes, and so on.
            assert [row for each in zip(*parts, strict=True) for row in each] == rows(batches)
            assert {number: s for share in shares for number, s in share[step][1].items()} == states


def test_the_stacked_batch_is_pinned_not_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tuple(tensor.shape)), tensor)[1])
    batches = StreamBatches(file_stream_shards(tmp_path), plan(micro=4), num_workers=0, pin_memory=True)
    assert [len(batch.input_ids) for batch in batches.steps(0, 2, {})] == [4] * 4
    assert pinned == [(BATCH, 24)] * 4  # the inputs and targets of two steps


@pytest.mark.parametrize(
    ("shards", "batch_size", "count"), [(1, 8, 1), (100, 8, 8), (100, 12, 4), (3, 8, 2), (100, 7, 1)]
)
def test_the_number_of_stream_shards_follows_from_shards_and_batch(shards: int, batch_size: int, count: int) -> None:
    assert stream_shard_count(shards, batch_size) == count


def test_a_number_of_stream_shards_that_is_asked_for_must_fit() -> None:
    assert stream_shard_count(100, 48, 24) == 24
    with pytest.raises(UsageError, match="stream_shards=16 must divide the batch, batch_size=24"):
        stream_shard_count(100, 24, 16)
    with pytest.raises(UsageError, match="stream_shards=12 is above the 11 parts"):
        stream_shard_count(11, 24, 12)


def test_options_of_a_stream_ask_for_what_it_lacks() -> None:
    with pytest.raises(UsageError, match="streaming needs eval_files or dataset_test_split"):
        TextOptions(text_files=["a.txt"], streaming=True)
    with pytest.raises(UsageError, match="streaming and mixture"):
        TextOptions(mixture=["1:a.txt"], streaming=True, eval_files=["b.txt"])
    with pytest.raises(UsageError, match="stream_shards=16 is for streaming"):
        TextOptions(text_files=["a.txt"], stream_shards=16)


def test_a_streamed_dataset_needs_its_column(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ["a"]}).to_json(tmp_path / "rows.jsonl")
    options = TextOptions(dataset_name=str(tmp_path), streaming=True, eval_files=["unread.txt"])
    with pytest.raises(DataError, match="'text'"):
        run(stream_shards_of(train_sources(options)[0][1].streamed_shards(may_cut=True), BATCH), plan(), range(1))
