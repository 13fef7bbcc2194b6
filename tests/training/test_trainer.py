"""The trainer's updates against torch's own optimizer, in every precision, on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gpt_kit_hf import AMPTrainer, GPTModel, UsageError, create_model_config
from gpt_kit_hf.training.trainer import resolve_precision


def tiny_model(**overrides: Any) -> GPTModel:
    torch.manual_seed(1)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61, "max_position_embeddings": 16}
    return GPTModel(create_model_config("nano-xs", **{**shape, **overrides}))


def pairs(rows: int = 6, masked: bool = True) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 61, (rows, 17))
    targets = ids[:, 1:].clone()
    if masked:
        targets[torch.rand(targets.shape) < 0.3] = -100
    return ids[:, :-1], targets


def trainer_of(model: nn.Module, precision: str = "fp32", **options: Any) -> AMPTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return AMPTrainer(model, optimizer, mixed_precision=precision, accelerator=Accelerator(cpu=True), **options)


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_fp32_updates_equal_a_hand_written_loop() -> None:
    # In float64: AdamW makes a full step of a gradient that is all rounding.
    model = tiny_model().double()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    trainer = trainer_of(model, max_grad_norm=0.5)
    for _ in range(3):
        inputs, targets = pairs()
        report = trainer.train_step(inputs, targets)
        logits = reference(inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert report.loss == pytest.approx(loss.item(), abs=1e-5)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert report.trained_tokens == int((targets != -100).sum())
        assert report.skipped is None
    assert_same_weights(model, reference, 1e-9)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [2, 2, 2], [5, 1]])
def test_split_into_micro_batches_changes_nothing(cuts: list[int]) -> None:
    """Whatever the cut, each trained token weighs the same: a mean of means would not."""
    inputs, targets = pairs()
    targets[0, 3:] = -100
    whole, parts = tiny_model(), tiny_model()
    trainer_whole, trainer_parts = trainer_of(whole), trainer_of(parts)
    one = trainer_whole.train_step(inputs, targets)
    many = trainer_parts.update(list(zip(inputs.split(cuts), targets.split(cuts), strict=True)))
    assert many.loss == pytest.approx(one.loss, abs=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    # AdamW's first step divides a gradient by itself: compare where that is not noise.
    assert_same_weights(whole, parts, 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_on_the_cpu(precision: str) -> None:
    model = tiny_model()
    trainer = trainer_of(model, precision)
    inputs, targets = pairs(masked=False)
    reports = [trainer.train_step(inputs, targets) for _ in range(30)]
    assert trainer.precision == precision
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all((report.loss_scale is not None) == (precision == "fp16") for report in reports)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_forward_pass_runs_in_the_precision(precision: str) -> None:
    seen = []
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    trainer_of(model, precision).train_step(*pairs())
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]


def test_fp16_scales_the_loss_and_halves_the_scale_when_a_gradient_overflows() -> None:
    model = tiny_model()
    trainer = trainer_of(model, "fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(model)
    report = trainer.train_step(*pairs())
    assert report.skipped is not None
    assert "gradient norm" in report.skipped
    assert report.loss_scale == 2.0**40
    assert trainer.scaler.get_scale() == 2.0**39
    assert_same_weights(model, before)
    assert not trainer.optimizer.state_dict()["state"]
    reports = [trainer.train_step(*pairs()) for _ in range(40)]
    assert reports[-1].skipped is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_non_finite_loss_changes_neither_weights_nor_optimizer(precision: str) -> None:
    model = tiny_model()
    trainer = trainer_of(model, precision)
    trainer.train_step(*pairs())
    before, state = copy.deepcopy(model), copy.deepcopy(trainer.optimizer.state_dict()["state"])
    hook = model.lm_head.register_forward_hook(lambda *args: args[2] * float("nan"))
    report = trainer.train_step(*pairs())
    hook.remove()
    assert report.skipped == "loss is nan"
    assert_same_weights(model, before)
    after = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert trainer.train_step(*pairs()).skipped is None


def test_batch_without_trained_tokens_changes_nothing() -> None:
    model = tiny_model()
    before = copy.deepcopy(model)
    inputs, targets = pairs()
    report = trainer_of(model).train_step(inputs, torch.full_like(targets, -100))
    assert (report.loss, report.trained_tokens, report.skipped) == (0.0, 0, "no trained token")
    assert_same_weights(model, before)


def test_caller_may_seed_each_micro_batch() -> None:
    inputs, targets = pairs()
    model = tiny_model(dropout=0.3)
    seen: list[int] = []

    def seed(index: int) -> None:
        seen.append(index)
        torch.manual_seed(index)

    parts = list(zip(inputs.split(3), targets.split(3), strict=True))
    other = copy.deepcopy(model)
    first = trainer_of(model).update(parts, before_micro_batch=seed)
    torch.rand(7)
    again = trainer_of(other).update(parts, before_micro_batch=seed)
    assert seen == [0, 1, 0, 1]
    assert first == again
    assert_same_weights(model, other)


def test_auto_precision_follows_the_launcher_then_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    assert resolve_precision("auto", cpu) == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_precision("auto", cpu) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert resolve_precision("auto", cpu) == "fp16"
    assert resolve_precision("no", cpu) == "fp32"


def test_unknown_or_unavailable_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown mixed_precision 'fp61'; did you mean 'fp16'"):
        resolve_precision("fp61", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UsageError, match="bf16: this GPU has no bf16; use fp16 or fp32"):
        resolve_precision("bf16", torch.device("cuda"))
    with pytest.raises(UsageError, match="not available on 'mps'"):
        resolve_precision("fp16", torch.device("mps"))
    with pytest.raises(UsageError, match="max_grad_norm must be above 0"):
        trainer_of(tiny_model(), max_grad_norm=0.0)
