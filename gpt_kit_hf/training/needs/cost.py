"""What a step takes, measured before the first one: its time and its memory. The model and the optimizer stay.

On a CPU memory is the process's resident memory, as the allocator needs up to half as much again as the tensors in it;
on other devices it is that of the tensors.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_kit_hf.model.losses import Batch, summed_batch_loss
from gpt_kit_hf.training.log.pace import peak_memory
from gpt_kit_hf.training.optim.muon import MuonWithAdamW
from gpt_kit_hf.training.runtime.available_memory import out_of_memory
from gpt_kit_hf.training.runtime.memory import release_freed_memory
from gpt_kit_hf.training.state.sharded_state import local_part

# A batch of so many rows, on the CPU.
Rows: TypeAlias = Callable[[int], Batch]
Autocast: TypeAlias = Callable[[], AbstractContextManager[object]]

# Rows of the passes on a CPU from which the memory of larger ones is known: the first ones also load libraries.
_FEW_ROWS = (1, 2, 4)
# Elements of a group of parameters that are updated to time the update of all.
_UPDATED = 1 << 22
# A step is measured for so many seconds, at most so many times. The median of the times is what a run reaches on a
# machine that other programs use too; the shortest one is up to a fifth less.
_MEASURED_SECONDS = 1.0
_TIMES = 5


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """The memory that a step takes: `micro_batch_size` is the largest that fits, 0 if not even one row does.

    `asked` is about what a step would take with the micro-batches that were asked for, 0 if unknown. `weights` are
    there already. `passes` is what forward and backward passes take on top, gradients included, `state` what the
    optimizer's state will take. All are bytes of this process, on its device.
    """

    micro_batch_size: int
    asked: int
    weights: int
    passes: int
    state: int

    @property
    def added(self) -> int:
        """The bytes on top of what the process has before its first step."""
        return self.passes + self.state


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """The time of a micro-batch, forward and backward, and of the optimizer's update."""

    micro_batch: float
    update: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What an optimizer step takes: `seconds`, and `peak_bytes` with the weights, but without the process's code.

    `state_bytes` are those of the optimizer's state.
    """

    seconds: float
    peak_bytes: int
    state_bytes: int


def measure_cost(
    model: nn.Module,
    optimizer: Optimizer,
    rows: Rows,
    *,
    micro_batch_size: int,
    micro_steps: int = 1,
    autocast: Autocast = nullcontext,
) -> StepCost:
    """Return what a step of `micro_steps` micro-batches takes, by computing a few; nothing changes.

    `rows` makes the batches, such as `random_rows`. Models may be measured one after the other in a process.
    """
    probe = Probe(model, optimizer, rows, autocast, accumulates=micro_steps > 1)
    memory = probe.memory(micro_batch_size)
    batch = rows(micro_batch_size)
    seconds = probe.typical_seconds(batch)
    memory = probe.measured(memory)
    return StepCost(
        seconds=micro_steps * seconds.micro_batch + seconds.update,
        peak_bytes=memory.weights + memory.added,
        state_bytes=memory.state,
    )


def random_rows(vocab_size: int, length: int) -> Rows:
    """Return what makes batches of rows of `length` random ids; torch's random state stays."""

    def rows(count: int) -> Batch:
        ids = torch.randint(vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(0))
        return Batch(ids[:, :-1], ids[:, 1:])

    return rows


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights in this process, tied ones once."""
    return sum({t.data_ptr(): t.nbytes for t in map(local_part, model.parameters())}.values())


def first_rows(batch: Batch, count: int) -> Batch:
    """Return the first rows of a batch."""
    positions = None if batch.position_ids is None else batch.position_ids[:count]
    return Batch(batch.input_ids[:count], batch.targets[:count], positions)


class Probe:
    """Computes passes and updates to measure them; weights, gradients, optimizer, modes and random state stay.

    `accumulates` says whether a step has several micro-batches, so that there are gradients in its passes. The model
    has no gradients before, and is the one inside of DistributedDataParallel; with FSDP2 all processes measure
    together, and the same.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, rows: Rows, autocast: Autocast, *, accumulates: bool
    ) -> None:
        self._model, self._optimizer, self._rows, self._autocast = model, optimizer, rows, autocast
        self._accumulates = accumulates
        self._device = next(model.parameters()).device
        self._gauge = _Gauge(self._device)

    @property
    def before(self) -> int:
        """The bytes that the process had before."""
        return self._gauge.before

    def memory(self, micro_batch_size: int, available: float = math.inf) -> StepMemory:
        """Return the memory of a step with micro-batches of this size, or of a half, a quarter, ... that fits.

        `available` is how many bytes the process may take on top of what it has. On a CPU, what would not fit is not
        tried, as the system would kill the process.
        """
        state = self._state_bytes()
        left, tried, too_many = available - state, dict[int, float](), math.inf
        if self._device.type == "cpu":
            for few in (few for few in _FEW_ROWS if few < micro_batch_size):
                if _extrapolated(tried, few) > left or not self._fits(few, left):
                    too_many = few
                    break
                tried[few] = self._gauge.risen()

        def fits(size: int) -> bool:
            if size in tried or size >= too_many:
                return size in tried
            return _extrapolated(tried, size) <= left and self._fits(size, left)

        size = micro_batch_size
        while size and not fits(size):
            size = -(-size // 2) if size > 1 else 0
        if size:
            tried.setdefault(size, self._gauge.risen())
        passes = _extrapolated(tried, max(size, 1))
        asked = _extrapolated(tried, micro_batch_size)
        weights = weight_bytes(self._model)
        if isinstance(self._optimizer, MuonWithAdamW) and tried:
            updating = self._optimizer.update_bytes()
            gradients = sum(p.nbytes for p in map(local_part, self._model.parameters()) if p.requires_grad)
            # glibc finds no room for batches of matrices in between what the passes have freed.
            passes = passes + updating if self._device.type == "cpu" else max(passes, gradients + updating)
        return StepMemory(
            micro_batch_size=size,
            asked=round(asked + state) if tried else 0,
            weights=weights,
            passes=round(passes),
            state=state,
        )

    def seconds(self, batch: Batch) -> StepSeconds:
        """Return the times of this micro-batch and of an update, after passes of its size."""
        with self._probing():
            micro_batch = self._timed(lambda: self._pass(batch))
        return StepSeconds(micro_batch=micro_batch, update=self._update_seconds())

    def typical_seconds(self, batch: Batch) -> StepSeconds:
        """Return the medians of the times of about a second; one process alone calls."""
        found, began = [self.seconds(batch)], time.perf_counter()
        while len(found) < _TIMES and time.perf_counter() - began < _MEASURED_SECONDS - found[0].micro_batch:
            found.append(self.seconds(batch))
        return StepSeconds(
            micro_batch=statistics.median(each.micro_batch for each in found),
            update=statistics.median(each.update for each in found),
        )

    def forward_seconds(self, batch: Batch, autocast: Autocast) -> float:
        """Return the time of computing a batch's loss without gradients."""
        with self._probing(), torch.no_grad():
            self._model.eval()
            return self._timed(lambda: self._loss(batch, autocast))

    def measured(self, memory: StepMemory) -> StepMemory:
        """Return the memory with what all passes so far have taken."""
        return replace(memory, passes=max(memory.passes, self._gauge.risen() - memory.state))

    # --- passes

    def _fits(self, size: int, available: float) -> bool:
        """Compute a pass; return whether memory was enough, with no more than `available` bytes on a CPU."""

        def checked(saved: Tensor) -> Tensor:
            if self._gauge.risen() > available:
                raise MemoryError
            return saved.detach()

        guarded = self._device.type == "cpu" and available < math.inf
        hooks = torch.autograd.graph.saved_tensors_hooks(checked, lambda saved: saved)
        batch = self._rows(size)
        try:
            with self._probing(), hooks if guarded else nullcontext():
                for _ in range(1 + self._accumulates):
                    self._pass(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            if self._gauge.risen() <= available:
                return True
        # Outside of the handler, where the error no longer holds the tensors of the failed attempt.
        self._gauge.forget()
        return False

    def _pass(self, batch: Batch) -> None:
        if not self._accumulates:
            self._forget_gradients()
        # Divided, so that fp16 has no overflow.
        (self._loss(batch, self._autocast) / batch.targets.numel()).backward()  # type: ignore[no-untyped-call]

    def _loss(self, batch: Batch, autocast: Autocast) -> Tensor:
        with autocast():
            return summed_batch_loss(
                batch.input_ids, batch.targets, self._model, self._device, position_ids=batch.position_ids
            ).loss_sum

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Put the model in training mode, restore the modes, and forget gradients and draws of dropout."""
        modes = [(module, module.training) for module in self._model.modules()]
        devices = [] if self._device.type in ("cpu", "mps") else [self._device]
        kind = "cuda" if not devices else self._device.type
        self._model.train()
        try:
            # A compiler would take the sizes that it sees here for those of training.
            with torch.random.fork_rng(devices, device_type=kind), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._forget_gradients()
            for module, training in modes:
                module.training = training

    def _forget_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None

    def _timed(self, work: Callable[[], object]) -> float:
        self._synchronise()
        began = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - began

    def _synchronise(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    # --- the update, of copies of some parameters

    def _state_bytes(self) -> int:
        """Return the bytes of the optimizer's state after its first update, without those that are there already."""
        total = 0.0
        for trial, share in self._trials():
            trial.step()
            total += _bytes_of_state(trial) / share
        return max(0, round(total) - _bytes_of_state(self._optimizer))

    def _update_seconds(self) -> float:
        """Return the time of an update of all parameters."""
        total = 0.0
        for trial, share in self._trials():
            parameters = [parameter for group in trial.param_groups for parameter in group["params"]]

            def update(trial: Optimizer = trial, parameters: list[Tensor] = parameters) -> None:
                nn.utils.clip_grad_norm_(parameters, math.inf)
                trial.step()

            trial.step()  # makes the state
            total += statistics.mean(self._timed(update) for _ in range(2)) / share
        return total

    def _trials(self) -> Iterator[tuple[Any, float]]:
        """Yield an optimizer of copies of some parameters for each group, and which share of its elements they are."""
        for group in self._optimizer.param_groups:
            parameters = [local_part(p) for p in group["params"] if p.requires_grad]
            elements = sum(p.numel() for p in parameters)
            if not elements:
                continue
            some = _some_of(parameters, min(1.0, _UPDATED / elements))
            if "momentum" not in group:  # not Muon's, whose update is not by element
                some = [p if p.numel() <= _UPDATED else p.flatten()[:_UPDATED] for p in some]
            copies = [_with_gradient(p) for p in some]
            trial = copy.copy(self._optimizer)  # without what __init__ does, so that no process waits for others
            trial.state, trial.param_groups = defaultdict(dict), [{**group, "params": copies}]
            yield trial, sum(p.numel() for p in copies) / elements


def _some_of(parameters: list[Tensor], share: float) -> list[Tensor]:
    """Return at least a share of the parameters of each shape: what an update costs depends on the shape."""
    alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        alike[parameter.shape].append(parameter)
    return [p for same in alike.values() for p in same[: math.ceil(share * len(same))]]


def _with_gradient(parameter: Tensor) -> nn.Parameter:
    made = nn.Parameter(parameter.detach().clone())
    made.grad = made.detach().clone()
    return made


def _bytes_of_state(optimizer: Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local_part(value).nbytes for value in values if isinstance(value, Tensor))


def _extrapolated(tried: dict[int, float], size: int) -> float:
    """Return the memory of a pass of `size` rows by that of the two largest that were tried, 0.0 if unknown."""
    if size in tried or not tried:
        return tried.get(size, 0.0)
    *_, most = sizes = sorted(tried)
    if len(sizes) == 1:
        return tried[most] * size / most
    before = sizes[-2]
    return tried[most] + (tried[most] - tried[before]) / (most - before) * (size - most)


class _Gauge:
    """Measures by how many bytes the memory of this process, or of its device, has risen since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget()
        self.before = self._now()

    def forget(self) -> None:
        """Free what is not in use, and forget the most so far."""
        if self._device.type == "cpu":
            release_freed_memory()
        elif self._device.type != "mps":
            torch.accelerator.reset_peak_memory_stats(self._device)
        self._peak_before = peak_memory(self._device)

    def risen(self) -> int:
        """Return the most so far; on a CPU without glibc, less if it had been higher before."""
        peak = peak_memory(self._device)
        return max(self._now(), peak if peak > self._peak_before else 0) - self.before

    def _now(self) -> int:
        if self._device.type == "cpu":
            return int(psutil.Process().memory_info().rss)
        if self._device.type == "mps":
            return int(torch.mps.driver_allocated_memory())
        return int(torch.accelerator.memory_allocated(self._device))
