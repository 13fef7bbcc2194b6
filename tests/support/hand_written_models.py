"""Hand-written GPT models and helpers for the tests of conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt_kit_hf.model.checkpoints.layouts import add_zero_biases, build_model, rename_tensors
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 31, 12, 12, 2, 3
END = 30
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [29, 7, 1, 8, 28, 1, 8, 2]])


def randomize(model: nn.Module) -> Any:
    """Set random parameters: initial biases are all zero and norms all one, which would hide a swap."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3).add_(0.1)
    return model.eval()


def config_for(**options: Any) -> GPTKitConfig:
    return GPTKitConfig(**{**SHAPE, "max_position_embeddings": CONTEXT, **options})


def tiny_gpt_kit(**options: Any) -> Any:
    return randomize(GPTKitForCausalLM(GPTKitConfig(**{**SHAPE, "max_position_embeddings": CONTEXT, **options})))


def tiny_gpt2(kind: Any = GPT2LMHeadModel, **options: Any) -> Any:
    ids = {"bos_token_id": END, "eos_token_id": END}
    return randomize(kind(GPT2Config(**{**SHAPE, "n_positions": CONTEXT, **ids, **options})))


def convert_state_dict(state_dict: Mapping[str, Tensor], names: Mapping[str, str], config: GPTKitConfig) -> Any:
    """Return a float32 model in eval mode with copies of another model's tensors, renamed by a table."""
    tensors = rename_tensors(state_dict, names, "state_dict")
    add_zero_biases(tensors, config)
    return build_model(config, tensors, torch.float32, "state_dict")


def difference(first: Any, second: Any) -> float:
    with torch.no_grad():
        a, b = (out if isinstance(out, Tensor) else out.logits for out in (first(IDS), second(IDS)))
    assert a.abs().max() > 0.5  # or any two models would agree
    return float((a.float() - b.float()).abs().max())


def is_tied(model: Any) -> bool:
    """Whether the output projection is the token embedding: one storage, not two equal ones."""
    return bool(model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr())


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Causal attention, one row, head and token at a time; all (B, T, D)."""
    rows, length, width = query.shape
    size = width // heads
    out = torch.zeros_like(value)
    for row in range(rows):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for t in range(length):
                scores = key[row, : t + 1, part] @ query[row, t, part] / math.sqrt(size)
                out[row, t, part] = scores.softmax(0) @ value[row, : t + 1, part]
    return out


class NanoBlock(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH, bias=bias)
        self.attn = nn.Module()
        self.attn.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.attn.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.attn.register_buffer("bias", torch.ones(CONTEXT, CONTEXT).tril()[None, None])
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(WIDTH, 4 * WIDTH, bias=bias)
        self.mlp.c_proj = nn.Linear(4 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Any:
        attn: Any = self.attn
        mlp: Any = self.mlp
        query, key, value = attn.c_attn(self.ln_1(x)).split(WIDTH, dim=-1)
        x = x + attn.c_proj(attend(query, key, value, HEADS))
        wide = mlp.c_fc(self.ln_2(x))
        return x + mlp.c_proj(wide * (1 + torch.erf(wide / math.sqrt(2))) / 2)


class NanoModel(nn.Module):
    """A model with nanoGPT's names and arithmetic: fused Linear, exact GELU, tied head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        parts = {
            "wte": nn.Embedding(VOCAB, WIDTH),
            "wpe": nn.Embedding(CONTEXT, WIDTH),
            "h": nn.ModuleList(NanoBlock(bias) for _ in range(LAYERS)),
            "ln_f": nn.LayerNorm(WIDTH, bias=bias),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = parts["wte"].weight  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Any:
        parts: Any = self.transformer
        x = parts.wte(ids) + parts.wpe.weight[: ids.shape[1]]
        for block in parts.h:
            x = block(x)
        return self.lm_head(parts.ln_f(x))


class KitNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + self.shift


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


class KitBlock(nn.Module):
    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        self.att = nn.Module()
        for name in ("W_query", "W_key", "W_value"):
            self.att.add_module(name, nn.Linear(WIDTH, WIDTH, bias=qkv_bias))
        self.att.out_proj = nn.Linear(WIDTH, WIDTH)
        self.att.register_buffer("mask", torch.ones(CONTEXT, CONTEXT).triu(1))
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), TanhGelu(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm1, self.norm2 = KitNorm(), KitNorm()

    def forward(self, x: Tensor) -> Any:
        att: Any = self.att
        ff: Any = self.ff
        normed = self.norm1(x)
        x = x + att.out_proj(attend(att.W_query(normed), att.W_key(normed), att.W_value(normed), HEADS))
        return x + ff.layers(self.norm2(x))


class KitModel(nn.Module):
    """A model with the names and arithmetic of the from-scratch kits: tanh GELU, a head of its own."""

    def __init__(self, qkv_bias: bool = False) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.trf_blocks = nn.Sequential(*(KitBlock(qkv_bias) for _ in range(LAYERS)))
        self.final_norm = KitNorm()
        self.out_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x = self.tok_emb(ids) + self.pos_emb.weight[: ids.shape[1]]
        return self.out_head(self.final_norm(self.trf_blocks(x)))
