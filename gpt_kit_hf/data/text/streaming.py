"""Windows of text that is tokenized during training: read as several stream shards, resumed at any step.

A stream shard is a run of text shards. Sample k of a training run is the next window of stream shard k modulo their
number, so that a step's batch does not depend on how many processes and workers read them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import tiktoken
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gpt_kit_hf.data.order import BatchPlan, shuffled
from gpt_kit_hf.data.text.dataset_shards import DatasetShard, RowsShard
from gpt_kit_hf.data.text.shards import FileShard
from gpt_kit_hf.data.text.windows import window_item
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import WindowOptions
from gpt_kit_hf.tokenization import encodings

# JSON: {"chunk": number of the shuffle buffer, "used": windows of it that were taken, "place" and "skip": where it
# begins, "read" and "seen": what was found in the text before it, and with it}. A place is [pass, text shard, position
# in the text shard, 1 inside a document].
State: TypeAlias = dict[str, Any]
Place: TypeAlias = list[Any]
Window: TypeAlias = tuple[Tensor, ...]


class _TokenChunk(NamedTuple):
    place: Place
    ids: npt.NDArray[Any]
    begins_document: bool
    read: dict[str, int]  # what was found in the text before it
    seen: dict[str, int]  # and with it


class _WindowIds(NamedTuple):
    ids: npt.NDArray[Any]  # (max_length + 1,)
    starts: npt.NDArray[np.int64]  # the places in it where documents begin
    begin: tuple[Place, int]  # the place of its first chunk, and the ids to skip there
    read: dict[str, int]  # what was found in the text before its first chunk
    seen: dict[str, int]  # and up to the end of its last one


def stream_shard_count(text_shards: int, batch_size: int, wanted: int | None = None) -> int:
    """Return the number of stream shards, which have one text shard or more each.

    By default a power of two up to 8 that divides the batch. Raises UsageError for a `wanted` number that the batch or
    the text does not have.
    """
    if wanted is None:
        return next(n for n in (8, 4, 2, 1) if batch_size % n == 0 and (n <= text_shards or n == 1))
    if batch_size % wanted:
        raise UsageError(f"stream_shards={wanted} must divide the batch, batch_size={batch_size}")
    if wanted > text_shards:
        raise UsageError(
            f"stream_shards={wanted} is above the {text_shards} parts that the text has: files, dataset shards or "
            "blocks of some kilobytes"
        )
    return wanted


@dataclass(frozen=True, kw_only=True)
class StreamShard:
    """The windows of some text shards, endlessly: the first text shard follows the last, in one window with it.

    Windows are shuffled within buffers of `shuffle_windows`, by the seed and the buffer's number. A state is the place
    where the buffer begins and the number of its windows that were used, so that resuming reads one buffer at most.
    """

    shards: tuple[FileShard | RowsShard | DatasetShard, ...]
    encoding: tiktoken.Encoding
    windows: WindowOptions
    shuffle_windows: int
    seed: int

    def samples(self, state: State | None = None) -> Iterator[tuple[Window, State]]:
        """Yield windows, as `TokenWindows` gives them, each with the state after it."""
        state = state or {"chunk": 0, "used": 0, "place": [0, 0, None, 0], "skip": 0}
        number, used = state["chunk"], state["used"]
        windows = self._windows_in_order(state["place"], state["skip"], Counter(state.get("read", {})))
        size = self.shuffle_windows
        while True:
            buffer = [next(windows) for _ in range(size)]
            place, skip = buffer[0].begin
            found = {"read": buffer[0].read, "seen": buffer[-1].seen}
            order = shuffled(np.arange(size), size, self.seed, number)
            for index in range(used, size):
                ids, starts, *_ = buffer[order[index]]
                # Tensors are made here: a buffer of them would take several times the memory of ids.
                window = window_item(ids.astype(np.int64), starts[starts > 0] if self.windows.packing else None)
                yield window, {"chunk": number, "used": index + 1, "place": place, "skip": skip, **found}
            number, used = number + 1, 0

    def _windows_in_order(self, place: Place, skip: int, tally: Counter[str]) -> Iterator[_WindowIds]:
        """Yield windows in the order of the text."""
        length = self.windows.length + 1
        held: deque[_TokenChunk] = deque()
        total = 0
        for chunk in self._token_chunks(place, tally):
            held.append(chunk)
            total += chunk.ids.size
            while total - skip >= length:
                yield _gather(held, skip, length)
                skip += self.windows.step
                while skip >= held[0].ids.size:
                    skip -= held[0].ids.size
                    total -= held.popleft().ids.size

    def _token_chunks(self, place: Place, tally: Counter[str]) -> Iterator[_TokenChunk]:
        """Yield the text as ids from a place on, endlessly; `tally` is what was found before the place."""
        done, first, position, inside = place
        while True:
            found = first > 0 or position is not None
            for index in range(first, len(self.shards)):
                shard = self.shards[index]
                read = dict(tally)
                for text, ends, after in shard.chunks(position, tally):
                    ids, seen = encodings.encode_documents(self.encoding, [(text, ends)], shard.name), dict(tally)
                    if ids.size:
                        yield _TokenChunk([done, index, position, inside], ids, not inside, read, seen)
                        found, read = True, seen
                    position, inside = after, int(not ends)
                position = None
            if not found:
                raise DataError(f"{self.shards[0].name} and on: there is no text to train on")
            done, first, inside = done + 1, 0, 0


def _gather(held: Sequence[_TokenChunk], skip: int, length: int) -> _WindowIds:
    """Return the window of `length` ids from place `skip` of the chunks together."""
    arrays, starts, offset = [], [], -skip
    for chunk in held:
        if chunk.begins_document and 0 <= offset < length:
            starts.append(offset)
        arrays.append(chunk.ids[max(0, -offset) : length - offset])
        offset += chunk.ids.size
        if offset >= length:
            break
    first, last = held[0], held[len(arrays) - 1]
    return _WindowIds(np.concatenate(arrays), np.array(starts, np.int64), (first.place, skip), first.read, last.seen)


class _Taken(NamedTuple):
    """Samples of a stream shard in a step: their numbers in the batch, and their stacked tensors, (n, T) each."""

    numbers: list[int]
    columns: list[Tensor]


class _StepSamples(IterableDataset[tuple[dict[int, _Taken], dict[int, State]]]):
    """For each step, the samples that the plan's process takes of each of a worker's stream shards, and their states.

    Sample k of a batch is the next one of stream shard k modulo `count`, and belongs to process k modulo their number.
    """

    def __init__(
        self, shards: dict[int, StreamShard], count: int, states: dict[int, State], plan: BatchPlan, steps: int
    ) -> None:
        self.shards, self.count, self.states = shards, count, states
        self.plan, self.steps = plan, steps

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own = sorted(self.shards) if worker is None else sorted(self.shards)[worker.id :: worker.num_workers]
        readers = {number: self.shards[number].samples(self.states.get(number)) for number in own}
        try:
            for _ in range(self.steps):
                drawn = {number: self._draw(number, reader) for number, reader in readers.items()}
                yield {n: taken for n, (taken, _) in drawn.items()}, {n: state for n, (_, state) in drawn.items()}
        except DataError as error:
            yield error  # an error raised here would reach the user inside the traceback of a worker

    def _draw(self, number: int, reader: Iterator[tuple[Window, State]]) -> tuple[_Taken, State]:
        """Return the process's samples of a stream shard in the next step, and the shard's state after the step."""
        plan, taken = self.plan, {}
        for place in range(number, plan.batch_size, self.count):
            window, state = next(reader)
            if place % plan.num_processes == plan.process_index:
                taken[place] = window
        # Stacked here: a worker sends each tensor by itself.
        return _Taken(list(taken), [torch.stack(column) for column in zip(*taken.values(), strict=True)]), state


class StreamBatches:
    """The micro-batches of one process's share of a stream; `states` are its stream shards' after each step.

    Where there are more processes than stream shards, several read the same one, and each takes its own samples of it.
    """

    def __init__(self, shards: Sequence[StreamShard], plan: BatchPlan, *, num_workers: int, pin_memory: bool) -> None:
        self.shards, self.plan = shards, plan
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.states: dict[int, State] = {}

    def steps(self, first_step: int, last_step: int, states: dict[int, State]) -> Iterator[Batch]:
        """Yield the micro-batches of the steps; `states` are the stream shards' before the first of them."""
        plan, count = self.plan, len(self.shards)
        apart = math.gcd(plan.num_processes, count)
        own = {n: shard for n, shard in enumerate(self.shards) if n % apart == plan.process_index % apart}
        self.states = {number: state for number, state in states.items() if number in own}
        workers = min(self.num_workers, len(own))
        samples = _StepSamples(own, count, self.states, plan, last_step - first_step)
        loader = DataLoader(samples, batch_size=None, num_workers=workers, generator=torch.Generator())
        loaded = iter(loader)
        for _ in range(first_step, last_step):
            taken: list[_Taken] = []
            for _ in range(max(1, workers)):
                result = next(loaded)
                if isinstance(result, DataError):
                    raise result
                taken += result[0].values()
                self.states.update(result[1])
            # In sample order: the first of each stream shard, then the second.
            order = torch.tensor([number for each in taken for number in each.numbers]).argsort()
            columns = [torch.cat(parts)[order] for parts in zip(*(each.columns for each in taken), strict=True)]
            # The batch, not each sample: a copy to the device waits unless what it reads is pinned.
            columns = [column.pin_memory() for column in columns] if self.pin_memory else columns
            for first in range(0, len(order), plan.micro_batch_size):
                yield Batch(*(column[first : first + plan.micro_batch_size] for column in columns))
