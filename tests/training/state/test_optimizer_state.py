"""A restored optimizer compared with one that was never interrupted; state that does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.storage.atomic_files import load_json, load_tensors, save_json, save_tensors
from gpt_kit_hf.training.state.optimizer_state import flatten_optimizer_state, restore_optimizer_state


class WideMomentum(torch.optim.Optimizer):
    """An optimizer that is not torch's: float32 state for a weight of any dtype, and a plain number."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("buffer", torch.zeros(p.shape, dtype=torch.float32))
                state["count"] = state.get("count", 0) + 1
                buffer.mul_(0.9).add_(p.grad.float())
                p.sub_((group["lr"] / state["count"] * buffer).to(p.dtype))


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    parameters = dict(model.named_parameters())
    matrices = [p for p in parameters.values() if p.ndim == 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, betas=(0.9, 0.95)),
    "AdamW fused": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, fused=True),
    "AdamW amsgrad": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, amsgrad=True, foreach=True),
    "AdamW lr tensor": lambda m: torch.optim.AdamW(groups_of(m), lr=torch.tensor(1e-2), fused=True),
    "SGD momentum": lambda m: torch.optim.SGD(groups_of(m), lr=1e-1, momentum=0.9, nesterov=True),
    "SGD plain": lambda m: torch.optim.SGD(groups_of(m), lr=1e-1),
    "Adagrad": lambda m: torch.optim.Adagrad(groups_of(m), lr=1e-1),
    "wide": lambda m: WideMomentum(groups_of(m.to(torch.bfloat16)), lr=1e-1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda m: torch.optim.Muon(groups_of(m)[0]["params"], lr=1e-2)


def make_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            lr = 1e-2 * (1 + step)
            group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def names_of(model: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_optimizer_continues_to_the_bit(tmp_path: Path, kind: str) -> None:
    oracle = make_model()
    train(oracle, straight := OPTIMIZERS[kind](oracle), range(10))

    first = make_model()
    train(first, optimizer := OPTIMIZERS[kind](first), range(5))
    tensors, state = flatten_optimizer_state(optimizer, names_of(first))
    save_tensors(tmp_path / "optimizer.safetensors", tensors)
    save_json(tmp_path / "optimizer.json", state)

    second = make_model()
    resumed = OPTIMIZERS[kind](second)
    second.load_state_dict(first.state_dict())
    stored = load_tensors(tmp_path / "optimizer.safetensors")
    restore_optimizer_state(resumed, stored, load_json(tmp_path / "optimizer.json"), names_of(second))
    assert repr(resumed.state_dict()) == repr(optimizer.state_dict())
    train(first, optimizer, range(5, 7))  # shares no memory with the resumed one
    train(second, resumed, range(5, 10))
    for name, value in oracle.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    ours, theirs = (flatten_optimizer_state(o, names_of(m)) for o, m in ((resumed, second), (straight, oracle)))
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, value in theirs[0].items():
        assert ours[0][name].dtype == value.dtype
        assert torch.equal(ours[0][name], value), name


def test_state_follows_the_name_and_not_the_position() -> None:
    model, other = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    tensors, state = flatten_optimizer_state(optimizer, names_of(model))
    assert {"exp_avg.0.weight", "exp_avg_sq.2.bias", "step.0.bias"} < set(tensors)
    reversed_order = torch.optim.AdamW(list(other.parameters())[::-1], lr=1.0)
    restore_optimizer_state(reversed_order, tensors, state, names_of(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], reversed_order.state[q]["exp_avg"])
    assert reversed_order.param_groups[0]["lr"] == 3e-2
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    train(other, reversed_order, range(3, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items()), "memory is shared"


def test_a_parameter_without_a_step_is_restored_without_state() -> None:
    model, other = make_model(), make_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model[0].requires_grad_(False)  # type: ignore[index]
    train(model, optimizer, range(2))
    tensors, state = flatten_optimizer_state(optimizer, names_of(model))
    assert len(optimizer.state) == 2
    fresh = torch.optim.AdamW(other.parameters(), fused=False)
    restore_optimizer_state(fresh, tensors, state, names_of(other))
    assert len(fresh.state) == 2
    assert fresh.param_groups[0]["fused"] is False


def trained() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, Any]]:
    model = make_model()
    optimizer = OPTIMIZERS["AdamW"](model)
    train(model, optimizer, range(2))
    tensors, state = flatten_optimizer_state(optimizer, names_of(model))
    return model, dict(tensors), json.loads(json.dumps(state))


TAMPERS: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], object], str]] = {
    "tensor gone": (lambda t, s: t.pop("exp_avg.0.weight"), r"exp_avg\.0\.weight is missing"),
    "tensor added": (lambda t, s: t.update(x=torch.ones(1)), "x belongs to no parameter"),
    "tensor shape": (lambda t, s: t.update({"exp_avg.0.bias": torch.ones(6)}), "recorded dtype and shape"),
    "tensor dtype": (lambda t, s: t.update({"exp_avg.0.bias": torch.ones(7).half()}), "recorded dtype"),
    "state gone": (lambda t, s: s["parameters"].pop("0.bias"), "not those of its parameter groups"),
    "shape": (lambda t, s: s["parameters"]["0.bias"].update(shape=[8]), r"0\.bias has shape \[7\]"),
    "name": (lambda t, s: s["groups"][1].update(parameters=["0.bias"]), r"2\.bias is only in the optimizer"),
    "group": (lambda t, s: s["groups"].pop(), "has 2 parameter groups, the checkpoint 1"),
    "option": (lambda t, s: s["groups"][0]["options"].pop("lr"), "option 'lr' is missing"),
    "text": (lambda t, s: s["groups"][0]["options"].update(lr="1"), "'lr' is '1', must be a number"),
    "betas": (lambda t, s: s["groups"][0]["options"].update(betas=0.9), "malformed"),
    "entry": (lambda t, s: s["parameters"]["0.bias"]["state"].update(x=[1]), "is a list, not stored"),
    "empty": (lambda t, s: s.clear(), "malformed"),
}


@pytest.mark.parametrize("tamper", TAMPERS)
def test_incomplete_optimizer_state_is_refused_and_changes_nothing(tamper: str) -> None:
    _, tensors, state = trained()
    alter, message = TAMPERS[tamper]
    alter(tensors, state)
    model = make_model()
    optimizer = OPTIMIZERS["AdamW"](model)
    before = repr(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        restore_optimizer_state(optimizer, tensors, state, names_of(model))
    assert repr(optimizer.state_dict()) == before


def test_unnamed_parameters_and_unsupported_state_are_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"shape \(7, 5\) in the optimizer has no name"):
        flatten_optimizer_state(optimizer, {})
    with pytest.raises(UsageError, match="the same name"):
        flatten_optimizer_state(optimizer, dict.fromkeys(model.parameters(), "w"))
    lbfgs = torch.optim.LBFGS(model.parameters())
    lbfgs.state[lbfgs.param_groups[0]["params"][0]]["old_dirs"] = [torch.ones(3)]
    with pytest.raises(CheckpointError, match="not stored here"):
        flatten_optimizer_state(lbfgs, names_of(model))
