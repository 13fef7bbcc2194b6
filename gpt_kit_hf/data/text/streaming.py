"""Windows of text that is tokenised while training reads it: shared out in lanes, and resumed at any step.

A stream is cut into lanes, each a run of its units. Sample k of a run is the next one of lane k modulo the number of
lanes, so that a step's batch is the same however many processes and workers read the lanes.
"""

from __future__ import annotations

from collections import deque
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
from gpt_kit_hf.data.text.shards import ReadableUnit
from gpt_kit_hf.data.text.windows import collate_windows, window_item
from gpt_kit_hf.errors import DataError, UsageError
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.data import WindowOptions
from gpt_kit_hf.tokenization import encodings

_MOST_LANES = 8

# JSON: {"chunk", "used", "place", "skip"}; a place is [pass, unit, position in the unit, 1 if inside a document].
LaneState: TypeAlias = dict[str, Any]
Place: TypeAlias = list[Any]


class _Part(NamedTuple):
    place: Place
    ids: npt.NDArray[Any]
    begins_document: bool


class _Sample(NamedTuple):
    ids: npt.NDArray[Any]  # (max_length + 1,)
    starts: npt.NDArray[np.int64]  # where documents begin in it


def lane_count(units: int, batch_size: int) -> int:
    """Return in how many lanes a stream is read: a power of two that divides the batch, 8 at the most."""
    return next(n for n in (_MOST_LANES, 4, 2, 1) if batch_size % n == 0 and (n <= units or n == 1))


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Windows of some units, endlessly: when all are read it begins anew, the end and the beginning in one window.

    Windows are shuffled within chunks of `shuffle_windows`, by the seed and the chunk's number. A state is where its
    chunk begins and how many of it are used, so that going on costs at most a chunk.
    """

    units: tuple[ReadableUnit, ...]
    encoding: tiktoken.Encoding
    windows: WindowOptions
    shuffle_windows: int
    seed: int

    def samples(self, state: LaneState | None = None) -> Iterator[tuple[tuple[Tensor, ...], LaneState]]:
        """Yield windows, as `TokenWindows` gives them, each with the state after it."""
        state = state or {"chunk": 0, "used": 0, "place": [0, 0, None, 0], "skip": 0}
        number, used = state["chunk"], state["used"]
        cut = self._cut(state["place"], state["skip"])
        size = self.shuffle_windows
        while True:
            chunk = [next(cut) for _ in range(size)]
            (place, skip) = chunk[0][1]
            order = shuffled(np.arange(size), size, self.seed, number)
            for index in range(used, size):
                after = {"chunk": number, "used": index + 1, "place": place, "skip": skip}
                yield self._item(chunk[order[index]][0]), after
            number, used = number + 1, 0

    def _cut(self, place: Place, skip: int) -> Iterator[tuple[_Sample, tuple[Place, int]]]:
        """Yield windows in the text's order, each with the place of the part it begins in and the ids before it."""
        length = self.windows.max_length + 1
        held: deque[_Part] = deque()
        total = 0
        for part in self._parts(place):
            held.append(part)
            total += part.ids.size
            while total - skip >= length:
                yield _gather(held, skip, length), (held[0].place, skip)
                skip += self.windows.step
                while skip >= held[0].ids.size:
                    skip -= held[0].ids.size
                    total -= held.popleft().ids.size

    def _parts(self, place: Place) -> Iterator[_Part]:
        """Yield the lane's text as ids from a place on, endlessly."""
        done, first, position, inside = place
        while True:
            some = first > 0 or position is not None
            for index in range(first, len(self.units)):
                unit = self.units[index]
                for text, ends, after in unit.parts(position):
                    ids = encodings.encode_documents(self.encoding, [(text, ends)], unit.name)
                    if ids.size:
                        yield _Part([done, index, position, inside], ids, not inside)
                        some = True
                    position, inside = after, int(not ends)
                position = None
            if not some:
                raise DataError(f"{self.units[0].name} and on: there is no text to train on")
            done, first, inside = done + 1, 0, 0

    def _item(self, sample: _Sample) -> tuple[Tensor, ...]:
        starts = sample.starts[sample.starts > 0] if self.windows.packing else None
        return window_item(sample.ids.astype(np.int64), starts)


def _gather(held: Sequence[_Part], skip: int, length: int) -> _Sample:
    """Return `length` ids from `skip` on of the parts together."""
    pieces, starts, offset = [], [], -skip
    for part in held:
        if part.begins_document and 0 <= offset < length:
            starts.append(offset)
        pieces.append(part.ids[max(0, -offset) : length - offset])
        offset += part.ids.size
        if offset >= length:
            break
    return _Sample(np.concatenate(pieces), np.array(starts, np.int64))


class _StepParts(IterableDataset[tuple[list[tuple[int, list[tuple[Tensor, ...]]]], dict[int, LaneState]]]):
    """For each step, what a worker's lanes give to it: the samples of each lane, and the lanes' states after them."""

    def __init__(self, lanes: dict[int, Lane], states: dict[int, LaneState], per_lane: int, steps: int) -> None:
        self.lanes, self.states, self.per_lane, self.steps = lanes, states, per_lane, steps

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        mine = sorted(self.lanes) if worker is None else sorted(self.lanes)[worker.id :: worker.num_workers]
        readers = {lane: self.lanes[lane].samples(self.states.get(lane)) for lane in mine}
        try:
            for _ in range(self.steps):
                taken, states = [], {}
                for lane, reader in readers.items():
                    drawn = [next(reader) for _ in range(self.per_lane)]
                    taken.append((lane, [item for item, _ in drawn]))
                    states[lane] = drawn[-1][1]
                yield taken, states
        except DataError as error:
            yield error  # raised here, a loader would wrap it in the traceback of its worker


class LaneBatches:
    """The micro-batches of one process's share of a stream, and where its lanes stand after each step."""

    def __init__(self, lanes: Sequence[Lane], plan: BatchPlan, *, num_workers: int, pin_memory: bool) -> None:
        if len(lanes) % plan.num_processes:
            raise UsageError(
                f"the stream has {len(lanes)} lanes, which {plan.num_processes} processes cannot share evenly: a "
                "stream has 8, 4 or 2 lanes where it has as many files, shards or kilobytes and they divide batch_size"
            )
        self.lanes, self.plan = lanes, plan
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.states: dict[int, LaneState] = {}

    def steps(self, first_step: int, last_step: int, states: dict[int, LaneState]) -> Iterator[Batch]:
        """Yield the micro-batches of the steps; `states` are the lanes' after the step before."""
        plan = self.plan
        own = {n: lane for n, lane in enumerate(self.lanes) if n % plan.num_processes == plan.process_index}
        self.states = {lane: state for lane, state in states.items() if lane in own}
        workers = min(self.num_workers, len(own))
        parts = _StepParts(own, self.states, plan.batch_size // len(self.lanes), last_step - first_step)
        loader = DataLoader(
            parts, batch_size=None, num_workers=workers, pin_memory=self.pin_memory, generator=torch.Generator()
        )
        given = iter(loader)
        for _ in range(first_step, last_step):
            taken: dict[int, list[tuple[Tensor, ...]]] = {}
            for _ in range(max(1, workers)):
                arrived = next(given)
                if isinstance(arrived, DataError):
                    raise arrived
                samples, after = arrived
                taken.update(samples)
                self.states.update(after)
            # In the order of their numbers: the first of each lane, then the second.
            items = [item for row in zip(*(taken[lane] for lane in sorted(taken)), strict=True) for item in row]
            for first in range(0, len(items), plan.micro_batch_size):
                yield collate_windows(items[first : first + plan.micro_batch_size])
