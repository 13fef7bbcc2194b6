"""What a training step costs a GPU, counted on fake tensors: the loss's memory traffic, products and waits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LOGITS = 8192 * 50257 * 2  # bytes of the logits of the batch, in bf16


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the cost of each phase of a step with GPT-2's width and vocabulary, and 8,192 tokens."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers
    import step_cost

    work = peers.Work(
        layers=2, width=768, heads=12, context=1024, batch=8, vocabulary=50257, dtype=torch.bfloat16, device="cuda:0"
    )
    try:
        return step_cost.count("gpt_kit_hf", work, eager=False)
    finally:
        for name in ("step_cost", "peers", "measure"):
            sys.modules.pop(name, None)


def test_a_step_moves_little_memory_for_its_loss_and_waits_once(counted: dict[str, Any]) -> None:
    assert [product for cost in counted.values() for product in cost.unaligned] == []
    assert sum(cost.waits for cost in counted.values()) <= 2
    # Logits: written by the product, read and replaced by the softmax, read by two products. The rest is the weight
    # and its gradient. Ten passes in float32 took 23.3 GB.
    assert 5 * LOGITS < counted["norm and loss"].bytes < 7 * LOGITS
    # Three products of the output projection, 2 FLOP a weight and token.
    assert counted["norm and loss"].flop == pytest.approx(3 * 2 * 8192 * 50257 * 768, rel=2e-3)
