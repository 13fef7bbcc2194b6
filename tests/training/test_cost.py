"""What a step takes, measured on a model that stays as it is."""

from __future__ import annotations

import copy
import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt_kit_hf import GPTModel, OptimizerOptions, create_model_config
from gpt_kit_hf.training.needs import cost
from gpt_kit_hf.training.needs.cost import Probe, StepSeconds, measure_cost, random_rows
from gpt_kit_hf.training.optim.muon import MuonWithAdamW
from gpt_kit_hf.training.optim.optimizer import create_optimizer

OPTIMIZERS = {
    "adamw": OptimizerOptions(),
    "muon": OptimizerOptions(optimizer="muon"),
    "normuon": OptimizerOptions(optimizer="muon", muon_beta2=0.95),
}


def model_of(width: int = 64, **overrides: Any) -> GPTModel:
    torch.manual_seed(1)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": width, "vocab_size": 300, "max_position_embeddings": 64}
    return GPTModel(create_model_config("modern-xs", **{**shape, **overrides}))


def probe_of(model: nn.Module, options: OptimizerOptions | None = None, *, accumulates: bool = False) -> Probe:
    optimizer = create_optimizer(model, options or OptimizerOptions())
    return Probe(model, optimizer, random_rows(300, 64), nullcontext, accumulates=accumulates)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int = 2) -> None:
    ids = torch.randint(300, (rows, 64))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stepped", [False, True], ids=["new", "stepped"])
def test_measuring_changes_nothing(name: str, stepped: bool) -> None:
    model = model_of(dropout=0.1)
    optimizer = create_optimizer(model, OPTIMIZERS[name])
    if stepped:
        step_once(model, optimizer)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    drawn = torch.get_rng_state()
    cost = measure_cost(model, optimizer, random_rows(300, 64), micro_batch_size=3, micro_steps=2)
    assert cost.seconds > 0.0
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    torch.testing.assert_close(after["state"], state["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_state_is_what_it_will_be(name: str) -> None:
    model = model_of()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad = False
    optimizer = create_optimizer(model, OPTIMIZERS[name])
    expected = Probe(model, optimizer, random_rows(300, 64), nullcontext, accumulates=False).memory(2).state
    step_once(model, optimizer)
    found = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert expected == pytest.approx(found, rel=1e-3)
    after = Probe(model, optimizer, random_rows(300, 64), nullcontext, accumulates=False).memory(2).state
    assert after <= 1e-3 * found  # what is there is not counted again


def test_the_state_of_a_large_model_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_kit_hf.training.needs.cost._UPDATED", 5000)
    model = model_of()
    for options in OPTIMIZERS.values():
        expected = probe_of(model, options).memory(1).state
        optimizer = create_optimizer(model, options)
        step_once(model, optimizer)
        found = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        assert expected == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(("layers", "rows"), [(3, 16), (6, 8), (2, 32)])
def test_memory_is_that_of_what_the_passes_keep(layers: int, rows: int) -> None:
    model = model_of(256, n_layer=layers)
    kept: dict[int, int] = {}

    def count(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved.detach()

    batch = random_rows(300, 64)(rows)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        output = model(batch.input_ids, shift_labels=batch.targets, skip_logits=True, use_cache=False)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    activations = sum(size for place, size in kept.items() if place not in weights)
    del output
    memory = probe_of(model).memory(rows)
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    # Beside them there are gradients and temporary tensors, and what the allocator loses.
    assert activations * 0.9 < memory.passes < 1.8 * activations + 2 * memory.weights


@pytest.mark.parametrize(
    ("available", "size", "tried"),
    [
        (math.inf, 32, [1, 2, 4, 32]),
        (3200, 32, [1, 2, 4, 32]),
        (3199, 16, [1, 2, 4, 16]),
        (899, 8, [1, 2, 4, 8]),
        (400, 4, [1, 2, 4]),
        (399, 2, [1, 2]),
        (100, 1, [1]),
        (99, 0, [1]),
    ],
)
def test_micro_batches_that_do_not_fit_are_halved(
    available: float, size: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pass takes 100 bytes a row.
    passes: list[int] = []
    monkeypatch.setattr(Probe, "_pass", lambda self, batch: passes.append(len(batch.input_ids)))
    monkeypatch.setattr("gpt_kit_hf.training.needs.cost._Gauge.risen", lambda self: 100 * max(passes))
    probe = probe_of(model_of())
    state = probe.memory(1).state
    passes.clear()
    memory = probe.memory(32, available + state)
    assert memory.micro_batch_size == size
    assert memory.passes == 100 * max(size, 1) if available > 99 else memory.passes >= 0
    assert passes == tried


def test_a_pass_is_given_up_when_it_takes_too_much() -> None:
    model = model_of(256)
    whole = probe_of(model).memory(32)
    left = whole.state + whole.passes / 4
    probe, computed = probe_of(model), list[int]()
    model.model.norm.register_forward_hook(lambda _, args, __: computed.append(len(args[0])))
    assert not probe._fits(32, left - whole.state)
    assert computed == []  # the last layer was not reached
    assert all(parameter.grad is None for parameter in model.parameters())


def test_running_out_of_memory_halves_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    tried: list[int] = []
    compute = Probe._pass

    def pass_(self: Probe, batch: Any) -> None:
        tried.append(len(batch.input_ids))
        if len(batch.input_ids) > 3:
            raise torch.OutOfMemoryError
        compute(self, batch)

    monkeypatch.setattr(Probe, "_pass", pass_)
    assert probe_of(model).memory(10).micro_batch_size == 3
    assert tried == [1, 2, 4, 3]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("clock", "times", "median"),
    [(0.1, [0.3, 0.1, 0.9, 0.2, 0.4], 0.3), (0.4, [0.3, 0.1], 0.2), (2.0, [0.7], 0.7)],
    ids=["at most five", "about a second", "a slow step once"],
)
def test_the_typical_time_is_the_median_of_a_second(
    monkeypatch: pytest.MonkeyPatch, clock: float, times: list[float], median: float
) -> None:
    ticks, left = itertools.count(step=clock), iter(times)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(Probe, "seconds", lambda self, batch: StepSeconds(micro_batch=(x := next(left)), update=2 * x))
    found = probe_of(model_of()).typical_seconds(random_rows(300, 64)(1))
    assert found == StepSeconds(micro_batch=pytest.approx(median), update=pytest.approx(2 * median))
    assert next(left, None) is None


def test_another_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def pass_(self: Probe, batch: Any) -> None:
        raise RuntimeError("another")

    monkeypatch.setattr(Probe, "_pass", pass_)
    with pytest.raises(RuntimeError, match="another"):
        probe_of(model_of()).memory(2)


class Live(TorchDispatchMode):
    """Notes the most bytes of the tensors that operations have made and that live at once."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.there, self.most = {tensor.untyped_storage().data_ptr() for tensor in there}, 0
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.living = {place: found for place, found in self.living.items() if not found[0].expired()}
        for tensor in (part for part in tree_leaves(result) if isinstance(part, Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.there:
                self.living[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.living.values()))
        return result


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_the_bytes_of_an_update_are_about_those_of_its_tensors(name: str, layers: int) -> None:
    model = model_of(128, n_layer=layers)
    optimizer = create_optimizer(model, OPTIMIZERS[name])
    assert isinstance(optimizer, MuonWithAdamW)
    step_once(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    there = [value for state in optimizer.state.values() for value in state.values()]
    there += [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    with Live(there) as live:
        optimizer.step()
    assert optimizer.update_bytes() == pytest.approx(live.most, rel=0.3)
