"""Decay groups and the learning rate of each step."""

from __future__ import annotations

import math

import pytest
import torch

from gpt_kit_hf import GPTModel, OptimizerOptions, UsageError, create_model_config, create_optimizer, learning_rate_at
from gpt_kit_hf.optimization import set_learning_rate


def rates(total: int, **options: object) -> list[float]:
    chosen = OptimizerOptions(learning_rate=2.0, **options)  # type: ignore[arg-type]
    return [learning_rate_at(step, total, chosen) for step in range(total)]


def test_matrices_decay_and_the_rest_does_not() -> None:
    model = GPTModel(create_model_config("nano-xs", vocab_size=50))
    optimizer = create_optimizer(model, OptimizerOptions(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name


def test_frozen_weights_are_left_out() -> None:
    model = GPTModel(create_model_config("nano-xs", vocab_size=50))
    model.model.embed_positions.requires_grad_(False)
    count = sum(len(group["params"]) for group in create_optimizer(model, OptimizerOptions()).param_groups)
    assert count == len(list(model.parameters())) - 1


def test_the_warm_up_rises_to_the_peak() -> None:
    for schedule in ("cosine", "wsd", "linear", "constant"):
        assert rates(100, warmup_steps=4, schedule=schedule)[:4] == [0.5, 1.0, 1.5, 2.0]
        assert rates(100, warmup_steps=0, schedule=schedule)[0] == 2.0


def test_each_schedule_follows_its_formula() -> None:
    cosine = rates(101, warmup_steps=0, schedule="cosine", min_lr_ratio=0.1)
    assert cosine == pytest.approx([0.2 + 0.9 * (1 + math.cos(math.pi * t / 100)) for t in range(101)])
    linear = rates(101, warmup_steps=0, schedule="linear", min_lr_ratio=0.5)
    assert linear == pytest.approx([2.0 - 1.0 * t / 100 for t in range(101)])
    wsd = rates(100, warmup_steps=10, schedule="wsd", min_lr_ratio=0.0, decay_ratio=0.2)
    assert wsd[10:81] == [2.0] * 71
    assert wsd[80:] == pytest.approx([2.0 * (1 - t / 19) for t in range(20)])
    assert set(rates(50, warmup_steps=0, schedule="constant")) == {2.0}


def test_a_run_shorter_than_its_warm_up_keeps_rising() -> None:
    assert rates(3, warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])


def test_all_groups_get_the_rate() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("learning_rate", math.inf), ("beta1", 1.0), ("weight_decay", -1.0), ("warmup_steps", -1),
     ("min_lr_ratio", 1.5), ("decay_ratio", -0.1), ("grad_clip", math.nan), ("adam_epsilon", 0.0)],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*, got {value}"):
        OptimizerOptions(**{name: value})
