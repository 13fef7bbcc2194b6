"""llama.cpp as a peer: the classic model of a benchmark as GGUF files, run by the package's engine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("F32", "F16", "Q8_0")


def methods(model: Any, folder: Path) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return what continues a prompt (1, T) greedily, by precision; nothing where xllamacpp is not installed."""
    if find_spec("xllamacpp") is None:
        print("llama.cpp is left out: pip install 'gpt-kit-hf[llama]'")
        return {}
    return {f"llama.cpp, {precision}": _method(model, folder / f"{precision}.gguf") for precision in PRECISIONS}


def _method(model: Any, file: Path) -> Callable[[Tensor, int], Tensor]:
    from gpt_kit_hf.generation.llama_cpp import LlamaCppModel

    _write(model, file, file.stem)
    # As many threads as torch.
    engine = LlamaCppModel(file, threads=torch.get_num_threads())

    def generate(prompt: Tensor, new: int) -> Tensor:
        ids = prompt[0].tolist()
        return torch.tensor([ids + engine.greedy(ids, new)])

    return generate


def _write(model: Any, file: Path, precision: str) -> None:
    """Write a model of GPT-2's shape; the vocabulary is made up, as only ids are read and written."""
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType[precision]
    writer = gguf.GGUFWriter(str(file), "gpt2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"a{number}" for number in range(config.vocab_size)])
    writer.add_token_merges(["a 0"])
    writer.add_eos_token_id(config.vocab_size - 1)
    for name, tensor in _tensors(model).items():
        values = tensor.detach().float().contiguous().cpu().numpy()
        if values.ndim == 1 or name.startswith("position"):
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> dict[str, Tensor]:
    base = model.model
    found = {"token_embd.weight": base.embed_tokens.weight, "position_embd.weight": base.embed_positions.weight}
    found |= {"output_norm.weight": base.norm.weight, "output_norm.bias": base.norm.bias}
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
