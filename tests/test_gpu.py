"""What only a GPU can show: `make gpu` runs these; elsewhere they are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gpt_kit_hf import AMPTrainer, GPTKitConfig, GPTKitForCausalLM, generate_text_autoregressive
from gpt_kit_hf.generation import decode_loop
from gpt_kit_hf.options.training import OptimizerOptions
from gpt_kit_hf.training.optim.optimizer import create_optimizer
from tests.support.shapes import both_shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
VOCAB, CONTEXT = 1000, 128


def model_of(**shape: Any) -> GPTKitForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_layer": 2, "n_head": 4, "n_embd": 128, "max_position_embeddings": CONTEXT}
    return GPTKitForCausalLM(GPTKitConfig(**{**sizes, **shape}))


STEPS = torch.randint(VOCAB, (5, 4, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
OPTIONS = OptimizerOptions(learning_rate=1e-3)


def trained_by_hand(model: GPTKitForCausalLM) -> list[float]:
    """Return the losses of a plain loop on the CPU."""
    optimizer, losses = create_optimizer(model, OPTIONS), []
    for rows in STEPS:
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@both_shapes
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 1e-2)])
def test_training_follows_a_plain_loop_on_the_cpu(shape: dict[str, Any], precision: str, tolerance: float) -> None:
    expected = trained_by_hand(model_of(**shape))
    model = model_of(**shape)
    trainer = AMPTrainer(model, create_optimizer(model, OPTIONS), mixed_precision=precision)
    assert trainer.accelerator.device.type == "cuda"
    losses = [trainer.train_step(rows[:, :-1], rows[:, 1:]).loss for rows in STEPS]
    assert losses == pytest.approx(expected, rel=tolerance)


@both_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_its_logits(shape: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(**shape).cuda().to(dtype)
    ids = torch.randint(VOCAB, (3, CONTEXT), device="cuda")
    loss = model(ids, labels=ids, skip_logits=True).loss
    logits = model(ids).logits.float()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


@both_shapes
def test_greedy_tokens_are_those_of_a_cpu(shape: dict[str, Any]) -> None:
    model, ids = model_of(**shape).eval(), torch.randint(VOCAB, (2, 8))
    expected = generate_text_autoregressive(model, ids, 100)
    assert generate_text_autoregressive(model.cuda(), ids, 100).tolist() == expected.tolist()


@both_shapes
@pytest.mark.parametrize("eos_token_id", [None, 7])
def test_a_cuda_graph_draws_the_same_tokens(
    shape: dict[str, Any], eos_token_id: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(**shape).cuda().eval(), torch.randint(VOCAB, (3, 8))
    sampling = {"temperature": 1.0, "top_k": 20, "eos_token_id": eos_token_id}
    torch.manual_seed(5)
    graph = generate_text_autoregressive(model, ids, 100, **sampling)
    monkeypatch.setattr(decode_loop, "CapturedStep", lambda step, device: step)
    torch.manual_seed(5)
    assert generate_text_autoregressive(model, ids, 100, **sampling).tolist() == graph.tolist()


def test_a_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    model = model_of().cuda()
    model.save_pretrained(tmp_path)
    back = GPTKitForCausalLM.from_pretrained(tmp_path)
    for (name, there), here in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(there.cpu(), here), name
