"""What a published model does, asked in a fresh process: this file is run by itself, with or without the package.

It reads requests as JSON from its standard input, loads each by transformers alone, and writes what it found as JSON,
with the logits as safetensors beside it. It imports nothing of the package, so that it can run where that is absent.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

PACKAGE = "gpt_kit_hf"
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def __init__(self, name: str) -> None:\n\tself.name = name  # 1234567890",
    "Größe, déjà vu, 東京, 🙂\r\n\n  three   spaces  ",
    "<|endoftext|>",
    "",
]
CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Japan?"},
]
NEW_TOKENS = 16
# Fields of a configuration that say where or with what it was read, not what it is.
_CIRCUMSTANCES = ("_name_or_path", "transformers_version", "auto_map", "_commit_hash", "dtype")


class _Absent:
    """A finder that has the package be absent, wherever it is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for the package, and leave all else to the other finders."""
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def probe_ids(vocab_size: int, context: int) -> list[list[int]]:
    """Return rows of ids that follow from the size of the vocabulary and of the context alone, of unequal length."""
    rows, state = [], 12345
    for length in (1, 7, 24):
        row = []
        for _ in range(max(1, min(length, context - NEW_TOKENS))):
            state = (state * 1103515245 + 12345) % 2**31
            row.append(state // 65536 % vocab_size)
        rows.append(row)
    return rows


def digest(value: Any) -> str:
    """Return what tells JSON values apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def probe(request: dict[str, Any], with_package: bool) -> dict[str, Any]:
    """Load what a request names, and return what it does; a part that fails is said under "failures"."""
    import transformers

    place, output = request["place"], Path(request["output"])
    roads: dict[str, Any] = {} if with_package else {"trust_remote_code": True}
    roads |= {key: request[key] for key in ("revision", "cache_dir") if request.get(key) is not None}
    found: dict[str, Any] = {"transformers": transformers.__version__, "failures": {}}
    parts: dict[str, Any] = {}
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModel", "GenerationConfig"):
        options = {k: v for k, v in roads.items() if name != "GenerationConfig" or k != "trust_remote_code"}
        try:
            parts[name] = getattr(transformers, name).from_pretrained(place, **options)
        except Exception as error:  # whatever a stranger's files do, it is a finding
            found["failures"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    asked = {
        "config": ("AutoConfig",),
        "generation_config": ("GenerationConfig",),
        "tokenizer": ("AutoTokenizer",),
        "template": ("AutoTokenizer",),
        "model": ("AutoModelForCausalLM",),
        "base": ("AutoModel",),
    }
    for name, needed in asked.items():
        if all(part in parts for part in needed):
            try:
                found[name] = _ASK[name](*(parts[part] for part in needed), output)
            except Exception as error:
                found["failures"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return found


def ask_config(config: Any, _: Path) -> dict[str, Any]:
    """Return the configuration, and for which Auto classes it brings code."""
    values = json.loads(config.to_json_string(use_diff=False))
    plain = {key: value for key, value in values.items() if key not in _CIRCUMSTANCES}
    return {"values": plain, "auto_map": sorted(values.get("auto_map") or {}), "module": type(config).__module__}


def ask_generation_config(config: Any, _: Path) -> dict[str, Any]:
    """Return the generation defaults."""
    return {k: v for k, v in json.loads(config.to_json_string()).items() if k not in _CIRCUMSTANCES}


def ask_tokenizer(tokenizer: Any, _: Path) -> dict[str, Any]:
    """Return what the tokenizer makes of texts, and its special tokens."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "vocabulary": digest(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])),
        "length": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
        "padding_side": tokenizer.padding_side,
    }


def ask_template(tokenizer: Any, _: Path) -> dict[str, Any]:
    """Return the chat template's digest and what it writes; nothing where there is none."""
    if tokenizer.chat_template is None:
        return {"source": None}
    written = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    return {"source": digest(tokenizer.chat_template), "written": written}


def ask_model(model: Any, output: Path) -> dict[str, Any]:
    """Return what the model computes: logits of rows alone and of the rows as one padded batch, tokens, losses."""
    import torch
    from safetensors.torch import save_file

    model.eval()
    text_config = model.config.get_text_config(decoder=True)
    context = getattr(text_config, "max_position_embeddings", None) or 64
    rows = probe_ids(text_config.vocab_size, context)
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    end = model.config.eos_token_id
    tensors: dict[str, Any] = {}
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0].float() for row in rows]
        tensors |= {f"row{number}": logits.contiguous() for number, logits in enumerate(alone)}
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        padded = model(ids, attention_mask=mask).logits.float()
        strays = [float((padded[n, -len(row) :] - alone[n]).abs().max()) for n, row in enumerate(rows)]
        # The end of text is a target like others, also where padding has its id.
        labelled = torch.tensor([[*rows[-1], end if isinstance(end, int) else 0]])
        logits = model(labelled).logits[0, :-1].float()
        by_hand = torch.nn.functional.cross_entropy(logits, labelled[0, 1:])
        loss = model(labelled, labels=labelled).loss.float()
        room = min(NEW_TOKENS, context - len(rows[-1]))
        written = model.generate(torch.tensor([rows[-1]]), max_new_tokens=room, do_sample=False)[0].tolist()
    save_file(tensors, str(output))
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "tied": outer is not None and inner.weight.data_ptr() == outer.weight.data_ptr(),
        "eos": model.config.eos_token_id,
        "generation_eos": model.generation_config.eos_token_id,
        "written": written[len(rows[-1]) :],
        "logits": digest([row.tolist() for row in alone]),
        "padding_difference": max(strays),
        "loss": float(loss),
        "loss_by_hand": float(by_hand),
    }


def ask_base(model: Any, _: Path) -> dict[str, Any]:
    """Return what the model without its head computes."""
    import torch

    model.eval()
    text_config = model.config.get_text_config(decoder=True)
    rows = probe_ids(text_config.vocab_size, getattr(text_config, "max_position_embeddings", None) or 64)
    with torch.no_grad():
        states = model(torch.tensor([rows[-1]])).last_hidden_state.float()
    return {"class": type(model).__name__, "states": digest(states.tolist())}


_ASK: dict[str, Any] = {
    "config": ask_config,
    "generation_config": ask_generation_config,
    "tokenizer": ask_tokenizer,
    "template": ask_template,
    "model": ask_model,
    "base": ask_base,
}


def main() -> None:
    """Answer the requests of the standard input: {"package": bool, "answers": file, "requests": [...]}."""
    asked = json.load(sys.stdin)
    if asked["package"]:
        importlib.import_module(PACKAGE)
    else:
        sys.meta_path.insert(0, _Absent())
    answers = [probe(request, asked["package"]) for request in asked["requests"]]
    Path(asked["answers"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
