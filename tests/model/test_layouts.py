"""State dicts of hand-written models into ours by a table of names."""

from __future__ import annotations

import pytest
import torch
from hand_written_models import (
    KitModel,
    NanoModel,
    config_for,
    convert_state_dict,
    difference,
    is_tied,
    randomize,
    tiny_gpt_kit,
)

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.checkpoints.layouts import KIT_NAMES, NANOGPT_NAMES

pytestmark = pytest.mark.usefixtures("logged")


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_state_dicts_convert(bias: bool) -> None:
    nano = randomize(NanoModel(bias))
    ours = convert_state_dict(nano.state_dict(), NANOGPT_NAMES, config_for(use_bias=bias, hidden_act="gelu"))
    assert difference(nano, ours) <= 1e-5
    assert is_tied(ours)
    # The other GELU is another model.
    other = convert_state_dict(nano.state_dict(), NANOGPT_NAMES, config_for(use_bias=bias))
    assert difference(nano, other) > 1e-5


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_kit_state_dicts_convert(qkv_bias: bool) -> None:
    kit = randomize(KitModel(qkv_bias))
    config = config_for(tie_word_embeddings=False)
    ours = convert_state_dict(kit.state_dict(), KIT_NAMES, config)
    assert difference(kit, ours) <= 1e-5
    assert not is_tied(ours)
    assert qkv_bias is any(bool(layer.self_attn.q_proj.bias.any()) for layer in ours.model.layers)


def test_only_biases_of_query_key_and_value_are_zeroed() -> None:
    stored = randomize(KitModel()).state_dict()
    del stored["trf_blocks.0.att.out_proj.bias"]
    with pytest.raises(UsageError, match=r"lacks tensors of the model: model\.layers\.0\.self_attn\.o_proj\.bias$"):
        convert_state_dict(stored, KIT_NAMES, config_for(tie_word_embeddings=False))
    # A bias that other blocks have was lost.
    stored = randomize(KitModel(True)).state_dict()
    del stored["trf_blocks.0.att.W_key.bias"]
    with pytest.raises(UsageError, match=r"lacks tensors of the model: model\.layers\.0\.self_attn\.k_proj\.bias$"):
        convert_state_dict(stored, KIT_NAMES, config_for(tie_word_embeddings=False))


def test_a_head_that_differs_needs_an_untied_configuration() -> None:
    stored = randomize(KitModel(True)).state_dict()
    with pytest.raises(UsageError, match="the config needs tie_word_embeddings=False"):
        convert_state_dict(stored, KIT_NAMES, config_for())
    del stored["out_head.weight"]
    assert is_tied(convert_state_dict(stored, KIT_NAMES, config_for()))
    with pytest.raises(UsageError, match=r"lacks tensors of the model: lm_head\.weight"):
        convert_state_dict(stored, KIT_NAMES, config_for(tie_word_embeddings=False))


def test_a_custom_table_converts() -> None:
    ours = tiny_gpt_kit(n_layer=11)
    stored = {name: tensor for name, tensor in ours.state_dict().items() if ".self_attn." not in name}
    for layer in range(11):
        weights = {name: ours.model.layers[layer].self_attn.get_submodule(f"{name}_proj") for name in "qkvo"}
        stored[f"b{layer}_fused"] = torch.cat([weights[name].weight for name in "qkv"]).T
        stored[f"b{layer}_fused_bias"] = torch.cat([weights[name].bias for name in "qkv"])
        stored[f"b{layer}_out"] = weights["o"].weight.T
        stored[f"b{layer}_out_bias"] = weights["o"].bias
        stored[f"b{layer}_mask"] = torch.ones(1, dtype=torch.bool)
    names = {name: name for name in stored if not name.startswith("b")} | {
        "b{layer}_fused": "model.layers.{layer}.self_attn.{q,k,v}_proj.weight.T",
        "b{layer}_fused_bias": "model.layers.{layer}.self_attn.{q,k,v}_proj.bias",
        "b{layer}_out": "model.layers.{layer}.self_attn.o_proj.weight.T",
        "b{layer}_out_bias": "model.layers.{layer}.self_attn.o_proj.bias",
        "b{layer}_mask": "",
    }
    assert difference(ours, convert_state_dict(stored, names, ours.config)) == 0


def test_converting_copies() -> None:
    kit = randomize(KitModel(True))
    before = {name: tensor.clone() for name, tensor in kit.state_dict().items()}
    ours = convert_state_dict(kit.state_dict(), KIT_NAMES, config_for(tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in kit.state_dict().items())


def test_what_a_table_cannot_do_is_refused() -> None:
    stored, config = randomize(KitModel(True)).state_dict(), config_for(tie_word_embeddings=False)
    without_mask = {name: target for name, target in KIT_NAMES.items() if "mask" not in name}
    with pytest.raises(UsageError, match=r"layout does not have: trf_blocks\.0\.att\.mask, trf_blocks\.1\.att\.mask$"):
        convert_state_dict(stored, without_mask, config)
    with pytest.raises(UsageError, match=r"model does not have: model\.positions\.weight"):
        convert_state_dict(stored, {**KIT_NAMES, "pos_emb.weight": "model.positions.weight"}, config)
    twice = {**KIT_NAMES, "trf_blocks.{layer}.att.W_key.bias": "model.layers.{layer}.self_attn.q_proj.bias"}
    with pytest.raises(UsageError, match=r"is the second tensor that the layout calls model\.layers\.0\.self_attn\.q"):
        convert_state_dict(stored, twice, config)
    with pytest.raises(UsageError, match=r"state_dict: tok_emb\.weight cannot be split into 3 equal parts"):
        convert_state_dict(stored, {**KIT_NAMES, "tok_emb.weight": "{a,b,c}"}, config)
    with pytest.raises(UsageError, match=r"final_norm\.scale cannot be transposed: its shape is \(12,\)"):
        convert_state_dict(stored, {**KIT_NAMES, "final_norm.scale": "model.norm.weight.T"}, config)
    with pytest.raises(UsageError, match=r"model\.embed_tokens\.weight has shape \(31, 12\), the model \(32, 12\)"):
        convert_state_dict(stored, KIT_NAMES, config_for(tie_word_embeddings=False, vocab_size=32))
