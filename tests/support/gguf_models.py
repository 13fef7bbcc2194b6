"""A GGUF file of the tiny model over bytes, written tensor by tensor with the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM

from gpt_kit_hf.tokenization.export import EOS_TOKEN, byte_characters


def write_tiny_gguf(folder: Path, file: Path, *, chat_template: str | None = None) -> None:
    """Write the classic model of a folder, whose vocabulary is the bytes, as a file in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, eos = model.config, 256
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte_characters(), EOS_TOKEN])
    writer.add_token_types([*[gguf.TokenType.NORMAL] * eos, gguf.TokenType.CONTROL])
    writer.add_token_merges(["Ā Ā"])  # there must be one; this makes no token
    writer.add_bos_token_id(eos)
    writer.add_eos_token_id(eos)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, tensor in _tensors(model).items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    base = model.model
    found = {
        "token_embd.weight": base.embed_tokens.weight,
        "position_embd.weight": base.embed_positions.weight,
        "output_norm.weight": base.norm.weight,
        "output_norm.bias": base.norm.bias,
        "output.weight": model.lm_head.weight,
    }
    for number, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        query_key_value = (attention.q_proj, attention.k_proj, attention.v_proj)
        found[f"blk.{number}.attn_qkv.weight"] = torch.cat([each.weight for each in query_key_value])
        found[f"blk.{number}.attn_qkv.bias"] = torch.cat([each.bias for each in query_key_value])
        modules = {"attn_norm": layer.input_layernorm, "attn_output": attention.o_proj}
        modules |= {"ffn_norm": layer.post_attention_layernorm, "ffn_up": mlp.up_proj, "ffn_down": mlp.down_proj}
        for name, module in modules.items():
            found[f"blk.{number}.{name}.weight"], found[f"blk.{number}.{name}.bias"] = module.weight, module.bias
    return found
