"""The modern shape, with transformers' Qwen3 and Llama on the same weights as oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from gpt_kit_hf import GPTKitForCausalLM, create_model_config
from gpt_kit_hf.options.training import OptimizerOptions
from gpt_kit_hf.training.optim.optimizer import create_optimizer

VOCAB, TABLE = 61, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TABLE,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}

# Each of the shape's fields at least once with and without the others.
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2, "rope_parameters": YARN},
    {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-2},
    {"qk_norm": False},
    {"qk_norm": False, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
    {"qk_norm": False, "rope_parameters": LINEAR, "tie_word_embeddings": False},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000}, "intermediate_size": 40},
]


def modern_model(**overrides: Any) -> GPTKitForCausalLM:
    model = GPTKitForCausalLM(create_model_config("modern-xs", **{**SIZES, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, so that one left out shows in the logits
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.3)
    return model


def native_twin(model: GPTKitForCausalLM) -> PreTrainedModel:
    """transformers' model of the same shape and weights."""
    config = model.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    shape = {name: getattr(config, name) for name in (*names, "rope_parameters")} | {"eos_token_id": None}
    qwen3, llama = (Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)
    config_class, model_class = qwen3 if config.qk_norm else llama
    theirs: PreTrainedModel = model_class(config_class(**shape))
    theirs.load_state_dict(model.state_dict())  # strict: the names are the same
    return theirs.eval()


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("overrides", SHAPES, ids=str)
def test_loss_logits_and_gradients_are_those_of_transformers(overrides: dict[str, Any], attention: str) -> None:
    model = modern_model(**overrides)
    theirs = native_twin(model)
    ids = random_ids(3, 40)
    for each in (model, theirs):
        each.set_attn_implementation(attention)
        each(ids, labels=ids).loss.backward()
    ours, other = model(ids, labels=ids), theirs(ids, labels=ids)
    assert relative_difference(ours.logits, other.logits) <= 1e-5
    assert ours.loss.item() == pytest.approx(other.loss.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_difference(parameter.grad, gradients[name]) <= 1e-4, name


def test_hidden_states_and_attentions_are_those_of_qwen3() -> None:
    model = modern_model(num_key_value_heads=2)
    theirs = native_twin(model)
    ids = random_ids(3, 17)
    for each in (model, theirs):
        each.set_attn_implementation("eager")
    ours, other = (each(ids, output_hidden_states=True, output_attentions=True) for each in (model, theirs))
    assert len(ours.attentions) == 2
    for mine, expected in zip(
        (*ours.hidden_states, *ours.attentions), (*other.hidden_states, *other.attentions), strict=True
    ):
        assert relative_difference(mine, expected) <= 1e-5


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("overrides", SHAPES[:2] + SHAPES[4:5], ids=str)
def test_generated_ids_are_those_of_transformers(overrides: dict[str, Any], cache: str | None) -> None:
    model = modern_model(**overrides)
    ids = random_ids(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    generated, expected = (
        each.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **options)
        for each in (model, native_twin(model))
    )
    assert generated.shape == (2, 29)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_half_precision_does_not_round_the_angles(dtype: torch.dtype) -> None:
    model = modern_model(max_position_embeddings=8192)
    angles = model.model.rotary_emb
    assert angles is not None
    positions = torch.arange(8000, 8192)[None]
    before = angles(positions, torch.float32)
    model.to(dtype)
    for after, expected in zip(angles(positions, torch.float32), before, strict=True):
        assert torch.equal(after, expected)
    ids = random_ids(1, 192)
    exact = model.float()(ids, position_ids=positions).logits
    assert relative_difference(model.to(dtype)(ids, position_ids=positions).logits.float(), exact) <= 0.1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_gives_the_same_anywhere_in_a_long_context(attention: str) -> None:
    # Rotary positions are relative; without the table of learned positions nothing else tells where a row stands.
    model = modern_model(max_position_embeddings=8192)
    model.set_attn_implementation(attention)
    ids, positions = random_ids(2, 20), torch.arange(20)[None]
    at_the_start = model(ids, position_ids=positions).logits
    assert relative_difference(model(ids, position_ids=positions + 8000).logits, at_the_start) <= 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_autocast_gives_attention_one_type(attention: str) -> None:
    model = modern_model().train()
    model.set_attn_implementation(attention)
    ids = random_ids(2, 17)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    cached = out.past_key_values.layers[0]
    assert cached.keys.dtype == cached.values.dtype == torch.bfloat16
    assert relative_difference(out.logits.float(), exact) <= 0.1
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters()
    )


def test_residual_projections_start_at_zero_and_learn() -> None:
    model = GPTKitForCausalLM(create_model_config("modern-xs", **SIZES))
    residual = {name for name, _ in model.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert len(residual) == 4
    for name, parameter in model.named_parameters():
        assert bool(parameter.any()) == (name not in residual), name
    ids = random_ids(2, 9)
    # At the start each block is the identity, so the head sees the normalised embedding.
    hidden = model.model.norm(model.model.embed_tokens(ids))
    assert torch.equal(model(ids).logits, model.lm_head(hidden))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(parameter.any() for parameter in model.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_muon_takes_the_matrices_and_no_norm_decays() -> None:
    model = GPTKitForCausalLM(create_model_config("modern-xs", **SIZES))
    optimizer = create_optimizer(model, OptimizerOptions(optimizer="muon", weight_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        ({names[parameter] for parameter in group["params"]}, "momentum" in group, group["weight_decay"])
        for group in optimizer.param_groups
    ]
    by_muon, embeddings, norms = groups
    projections = {
        f"model.layers.{layer}.{part}_proj.weight"
        for layer in range(2)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert by_muon == (projections, True, 0.1)
    assert embeddings == ({"model.embed_tokens.weight"}, False, 0.1)
    one_dimensional = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert norms == (one_dimensional, False, 0.0)
    assert len(one_dimensional) == 2 * 4 + 1
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
