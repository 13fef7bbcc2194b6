"""A tiny model folder, quick to make, whose greedy answers depend on every earlier token."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpt_kit_hf import GPTModel, create_model_config, get_chat_template, get_encoding, save_tokenizer
from gpt_kit_hf.hub.model_folder import write_model_folder

CONTEXT = 64
# Its markers are plain text, so that the bytes encoding has ids for them.
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'][0] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def write_tiny_model(folder: Path, *, chat_template: str | None = None, context: int = CONTEXT) -> None:
    """Write a random model over bytes; logits of unprintable bytes are zero, so that greedy text is ASCII."""
    torch.manual_seed(0)
    encoding = get_encoding("bytes")
    sizes = {"vocab_size": 257, "n_layer": 1, "n_head": 2, "n_embd": 16, "max_position_embeddings": context}
    model = GPTModel(create_model_config("nano-xs", **sizes, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # a random bias would predict the same token everywhere
                parameter.normal_(0.0, 0.8)
        model.lm_head.weight[: ord(" ")] = 0
        model.lm_head.weight[ord("~") + 1 :] = 0
    write_model_folder(folder, model.eval(), encoding)
    if chat_template is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)


def byte_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer export of the bytes encoding, with the default chat template."""
    save_tokenizer(get_encoding("bytes"), folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = get_chat_template("default")
    return tokenizer
