"""Tiny models of other families, each with a tokenizer of its family's kind, made without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEXT = "".join(
    f"The {age} {who} {does} the {what}.\n"
    for age in ("old", "new", "tall")
    for who in ("king", "fool", "ship")
    for does in ("sees", "loves", "leaves")
    for what in ("sea", "crown", "storm")
)
CONTEXT = 64
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(kind: str, folder: Path, *, text: str = TEXT) -> None:
    """Write a tokenizer: byte-level (gpt2), byte-level with a normalizer (qwen), or with byte fallback (llama)."""
    llama = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(llama if kind == "llama" else models.BPE())
    specials: dict[str, str] = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    options: dict[str, Any] = {"vocab_size": 300, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    if kind == "gpt2":
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "qwen":
        tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN), "isolated"), byte_level])
        specials = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        options = {"vocab_size": 80, "special_tokens": [*specials.values()]}
    tokenizer.train_from_iterator(text.splitlines(), trainers.BpeTrainer(show_progress=False, **options))
    if kind == "llama":
        content = json.loads(tokenizer.to_str())
        vocabulary = content["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)


def write_model(kind: str, folder: Path) -> None:
    """Write a random model with its tokenizer; dropout is the family's default."""
    write_tokenizer(kind, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, **ids)
        GPT2LMHeadModel(config).save_pretrained(folder)
        return
    # As Qwen's: more embeddings than the tokenizer has ids.
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": len(tokenizer) + 10 * (kind == "qwen"),
        "max_position_embeddings": CONTEXT, **ids,
    }  # fmt: skip
    llama = kind == "llama"
    model = LlamaForCausalLM(LlamaConfig(**shape)) if llama else Qwen2ForCausalLM(Qwen2Config(**shape))
    model.save_pretrained(folder)
