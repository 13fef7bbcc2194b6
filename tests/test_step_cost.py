"""What a training step costs a GPU, counted on fake tensors: the loss's memory traffic, products and waits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt_kit_hf import GPTKitForCausalLM
from gpt_kit_hf.model import packed_documents

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LOGITS = 8192 * 50257 * 2  # bytes of the logits of the batch, in bf16


@pytest.fixture
def step_cost(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_cost

    yield step_cost
    for name in ("step_cost", "peers", "measure"):
        sys.modules.pop(name, None)


def work_of(step_cost: Any, **changes: Any) -> Any:
    """Return the work of a step with GPT-2's width and vocabulary, and 8,192 tokens."""
    sizes = {"layers": 2, "width": 768, "heads": 12, "context": 1024, "batch": 8, "vocabulary": 50257}
    return step_cost.peers.Work(**{**sizes, **changes}, dtype=torch.bfloat16, device="cuda:0")


def test_a_step_moves_little_memory_for_its_loss_and_waits_once(step_cost: Any) -> None:
    counted = step_cost.count("gpt_kit_hf", work_of(step_cost), eager=False)
    assert [product for cost in counted.values() for product in cost.unaligned] == []
    assert sum(cost.waits for cost in counted.values()) <= 2
    # Logits: written by the product, read and replaced by the softmax, read by two products. The rest is the weight
    # and its gradient. Ten passes in float32 took 23.3 GB.
    assert 5 * LOGITS < counted["norm and loss"].bytes < 7 * LOGITS
    # Three products of the output projection, 2 FLOP a weight and token.
    assert counted["norm and loss"].flop == pytest.approx(3 * 2 * 8192 * 50257 * 768, rel=2e-3)


class Square(TorchDispatchMode):
    """Notes which tensors are of the size of attention's scores."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.names: list[str] = []
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names.append(name)
        if any(isinstance(t, Tensor) and t.shape[-2:] == (self.length, self.length) for t in tree_leaves(result)):
            self.found.append(name)
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_packed_rows_are_trained_on_a_gpu_without_a_mask(
    step_cost: Any, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's kernel for lengths has no dropout: with it, attention is masked."""
    monkeypatch.setattr(packed_documents, "_has_flash_kernels", lambda device: True)
    config = step_cost.peers.our_config(work_of(step_cost, vocabulary=64))
    config.attn_pdrop = dropout
    with step_cost.fake_gpu(step_cost.Costs(), eager=False):
        model = step_cost.on_gpu(GPTKitForCausalLM(config))
        ids = torch.zeros(8, 1024, dtype=torch.long, device=step_cost.GPU)
        bounds = torch.zeros(31, dtype=torch.int32, device=step_cost.GPU)
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 1024, "max_length_k": 1024}
        costs = step_cost.Costs()
        costs.phase = "backward"  # where C++ asks for the device that it was told
        with torch.autocast("cuda", torch.bfloat16), step_cost.Autocast(), costs, Square(1024) as square:
            packed = {"position_ids": ids, **lengths, "use_cache": False}
            model(ids, **packed, shift_labels=ids, skip_logits=True).loss.backward()
    assert (
        (square.names.count("_varlen_attn"), square.names.count("_varlen_attn_backward")) == (2, 2)
        if not dropout
        else (0, 0)
    )
    assert bool(square.found) == (dropout > 0)
