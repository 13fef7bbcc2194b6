"""Whom this package is measured against, on the same weights: transformers' GPT-2, and a model written by hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import measure
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_kit_hf import AMPTrainer, Batch, GPTKitConfig, GPTKitForCausalLM
from gpt_kit_hf.model.checkpoints.gpt2 import as_gpt2
from gpt_kit_hf.options.training import OptimizerOptions
from gpt_kit_hf.training.optim.optimizer import create_optimizer
from gpt_kit_hf.training.runtime.compilation import compile_blocks

# (layers, width, heads)
SHAPES = {"small": (6, 384, 6), "gpt2": (12, 768, 12), "tiny": (2, 64, 2), "gpt2-xl": (48, 1600, 25)}
RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training step: the shape of the model and of the batch."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocabulary: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        shape = f"{self.layers} layers, {self.width} wide, {self.batch} x {self.context} tokens"
        return f"{shape}, {self.vocabulary:,} in the vocabulary, {self.dtype}"

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    def flop(self, parameters: int) -> float:
        """Return the products of a step: 6 for each weight and token, and attention's (Chowdhery et al. 2022, B)."""
        positions = self.context * self.width
        return self.tokens * (6 * (parameters - positions) + 12 * self.layers * self.width * self.context)


def add_work_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")


class ByHand(nn.Module):
    """A GPT as one writes it for oneself: one matrix for query, key and value, and torch's attention."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        width = work.width
        self.heads = work.heads
        self.tokens, self.positions = nn.Embedding(work.vocabulary, width), nn.Embedding(work.context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm_2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(work.layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        rows, length = ids.shape
        hidden = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        for block in self.blocks:
            qkv = block["qkv"](block["norm_1"](hidden)).view(rows, length, 3, self.heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = hidden + block["out"](attended.transpose(1, 2).reshape(rows, length, -1))
            hidden = hidden + block["down"](F.gelu(block["up"](block["norm_2"](hidden)), approximate="tanh"))
        logits = F.linear(self.norm(hidden), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def take(self, model: GPTKitForCausalLM) -> ByHand:
        """Take a model's weights."""
        self.tokens.weight.copy_(model.model.embed_tokens.weight)
        self.positions.weight.copy_(model.model.embed_positions.weight)
        _take(self.norm, [model.model.norm])
        for block, layer in zip(self.blocks, model.model.layers, strict=True):
            attention = layer.self_attn
            _take(block["norm_1"], [layer.input_layernorm])
            _take(block["qkv"], [attention.q_proj, attention.k_proj, attention.v_proj])
            _take(block["out"], [attention.o_proj])
            _take(block["norm_2"], [layer.post_attention_layernorm])
            _take(block["up"], [layer.mlp.up_proj])
            _take(block["down"], [layer.mlp.down_proj])
        return self


def _take(module: Any, sources: Iterable[Any]) -> None:
    sources = list(sources)
    module.weight.copy_(torch.cat([source.weight for source in sources]))
    module.bias.copy_(torch.cat([source.bias for source in sources]))


def our_config(work: Work) -> GPTKitConfig:
    return GPTKitConfig(
        vocab_size=work.vocabulary,
        n_layer=work.layers,
        n_embd=work.width,
        n_head=work.heads,
        max_position_embeddings=work.context,
    )


def our_model(work: Work) -> GPTKitForCausalLM:
    torch.manual_seed(0)
    return GPTKitForCausalLM(our_config(work)).to(work.device).train()


def gpt2_of(model: GPTKitForCausalLM) -> Any:
    """Return transformers' GPT-2 with the weights of ours, in its fastest attention."""
    gpt2 = as_gpt2(model).to(model.device)
    gpt2.set_attn_implementation("sdpa")
    gpt2.config.use_cache = False
    return gpt2


# --- one training step of each: forward, backward, clip at 1, AdamW; returns the loss

Step = Callable[[Tensor, Tensor], float]


def our_trainer(work: Work, compiled: bool | None = None) -> AMPTrainer:
    """Return the package's trainer with its defaults: what `gpt-kit train` runs."""
    model = our_model(work)
    precision = "bf16" if work.dtype == torch.bfloat16 else "fp32"
    optimizer = create_optimizer(model, OptimizerOptions(learning_rate=RATE))

    trainer = AMPTrainer(
        model, optimizer, mixed_precision=precision, accelerator=Accelerator(cpu=work.device == "cpu")
    )
    compile_blocks(model, compiled, torch.device(work.device), print)
    return trainer


def our_step(work: Work, compiled: bool | None = None) -> Step:
    trainer = our_trainer(work, compiled)
    return lambda ids, targets: trainer.update([Batch(ids, targets)]).loss


def gpt2_step(work: Work, compiled: bool) -> Step:
    gpt2 = gpt2_of(our_model(work)).train()
    forward = torch.compile(gpt2) if compiled else gpt2
    # It shifts labels itself: targets that are shifted already go in by their own name.
    return _loop(work, gpt2, lambda ids, targets: forward(ids, labels=targets, shift_labels=targets).loss)


def by_hand_step(work: Work, compiled: bool) -> Step:
    model = ByHand(work).to(work.device).take(our_model(work)).train()
    return _loop(work, model, torch.compile(model) if compiled else model)


def _loop(work: Work, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Return the step that one writes by hand."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)

    def step(ids: Tensor, targets: Tensor) -> float:
        with torch.autocast(torch.device(work.device).type, work.dtype, enabled=work.dtype != torch.float32):
            loss = loss_of(ids.to(work.device), targets.to(work.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


STEPS: dict[str, Callable[[Work], Step]] = {
    "gpt_kit_hf": our_step,
    "gpt_kit_hf, blocks compiled": lambda work: our_step(work, compiled=True),
    "transformers GPT-2": lambda work: gpt2_step(work, compiled=False),
    "transformers GPT-2, compiled": lambda work: gpt2_step(work, compiled=True),
    "by hand": lambda work: by_hand_step(work, compiled=False),
    "by hand, compiled": lambda work: by_hand_step(work, compiled=True),
}


def work_of(options: argparse.Namespace) -> Work:
    layers, width, heads = SHAPES[options.shape]
    return Work(
        layers=layers,
        width=width,
        heads=heads,
        context=options.context,
        batch=options.batch,
        vocabulary=options.vocabulary,
        dtype=measure.DTYPES[options.precision],
        device=options.device,
    )


def batches_of(work: Work, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of random ids, (B, T) each, and what follows each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(work.vocabulary, (count, work.batch, work.context + 1), generator=generator)
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids]
