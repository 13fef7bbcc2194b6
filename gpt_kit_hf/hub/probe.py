"""The probe: a script that loads a model in a fresh process by transformers alone and reports what the model does.

It reads requests as JSON from standard input and writes its answers as JSON. It imports nothing of this package, so
that it runs where the package is absent. Its answers are published, and compared by `verify`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
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
# Fields of a configuration that depend on where or how it was loaded.
_LOADING_FIELDS = ("_name_or_path", "transformers_version", "auto_map", "_commit_hash", "dtype")


class _Absent:
    """A finder that hides the package, wherever it is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for the package; leave all other modules to the other finders."""
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def probe_ids(vocab_size: int, context: int) -> list[list[int]]:
    """Return rows of pseudo-random token ids, of unequal length, that depend on the two sizes only."""
    rows, state = [], 12345
    for length in (1, 7, 24):
        row = []
        for _ in range(max(1, min(length, context - NEW_TOKENS))):
            state = (state * 1103515245 + 12345) % 2**31
            row.append(state // 65536 % vocab_size)
        rows.append(row)
    return rows


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def probe(request: dict[str, Any], with_package: bool) -> dict[str, Any]:
    """Load the model at request["place"] and return the answer of each probe; errors are under "failures"."""
    import transformers

    failures: dict[str, str] = {}

    def attempt(name: str, results: dict[str, Any], action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            results[name] = action(*args, **kwargs)
        except Exception as error:  # files of unknown origin can fail with any exception
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"

    options = {key: request[key] for key in ("revision", "cache_dir") if request.get(key) is not None}
    code = {"trust_remote_code": request.get("remote_code", False) and not with_package}
    loaded: dict[str, Any] = {}
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModel", "GenerationConfig"):
        auto_options = options if name == "GenerationConfig" else options | code
        attempt(name, loaded, getattr(transformers, name).from_pretrained, request["place"], **auto_options)
    answers: dict[str, Any] = {"transformers": transformers.__version__, "failures": failures}
    for name, (auto_class, answer) in _PROBES.items():
        if auto_class in loaded:
            attempt(name, answers, answer, loaded[auto_class])
    return answers


def probe_config(config: Any) -> dict[str, Any]:
    """Return the configuration's values, the Auto classes that have code of its own, and its module."""
    values = json.loads(config.to_json_string(use_diff=False))
    plain = {key: value for key, value in values.items() if key not in _LOADING_FIELDS}
    return {"values": plain, "auto_map": sorted(values.get("auto_map") or {}), "module": type(config).__module__}


def probe_generation_config(config: Any) -> dict[str, Any]:
    """Return the generation defaults."""
    return {key: value for key, value in json.loads(config.to_json_string()).items() if key not in _LOADING_FIELDS}


def probe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return the ids of `TEXTS`, their decoded text, the vocabulary's digest and the special tokens."""
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


def probe_template(tokenizer: Any) -> dict[str, Any]:
    """Return the chat template's digest and its text for `CONVERSATION`; {"source": None} without a template."""
    if tokenizer.chat_template is None:
        return {"source": None}
    written = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    return {"source": digest(tokenizer.chat_template), "written": written}


def probe_model(model: Any) -> dict[str, Any]:
    """Return the logits' digest for single rows, their difference in a padded batch, losses and greedy tokens."""
    import torch

    model.eval()
    text_config = model.config.get_text_config(decoder=True)
    context = getattr(text_config, "max_position_embeddings", None) or 64
    rows = probe_ids(text_config.vocab_size, context)
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    eos = model.config.eos_token_id
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0].float() for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        padded = model(ids, attention_mask=mask, **_positions(model, mask)).logits.float()
        differences = [float((padded[n, -len(row) :] - alone[n]).abs().max()) for n, row in enumerate(rows)]
        # EOS must be a target like any other token, even where padding has the same id.
        labelled = torch.tensor([[*rows[-1], eos if isinstance(eos, int) else 0]])
        logits = model(labelled).logits[0, :-1].float()
        by_hand = torch.nn.functional.cross_entropy(logits, labelled[0, 1:])
        loss = model(labelled, labels=labelled).loss.float()
        new_tokens = min(NEW_TOKENS, context - len(rows[-1]))
        written = model.generate(torch.tensor([rows[-1]]), max_new_tokens=new_tokens, do_sample=False)[0].tolist()
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "tied": outer is not None and inner.weight.data_ptr() == outer.weight.data_ptr(),
        "eos": eos,
        "generation_eos": model.generation_config.eos_token_id,
        "written": written[len(rows[-1]) :],
        "logits": digest([row.tolist() for row in alone]),
        "padding_difference": max(differences),
        "loss": float(loss),
        "loss_by_hand": float(by_hand),
    }


def _positions(model: Any, mask: Any) -> dict[str, Any]:
    """Return the positions of padded rows for a model of transformers, which expects them from its caller."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    own = type(model).__module__.startswith("transformers.")
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes and own else {}


def probe_base(model: Any) -> dict[str, Any]:
    """Return the class of the model without its head, after a forward pass."""
    import torch

    with torch.no_grad():
        states = model.eval()(torch.tensor([[0]])).last_hidden_state
    return {"class": type(model).__name__, "finite": bool(states.isfinite().all())}


_PROBES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "config": ("AutoConfig", probe_config),
    "generation_config": ("GenerationConfig", probe_generation_config),
    "tokenizer": ("AutoTokenizer", probe_tokenizer),
    "template": ("AutoTokenizer", probe_template),
    "model": ("AutoModelForCausalLM", probe_model),
    "base": ("AutoModel", probe_base),
}


def main() -> None:
    """Answer the requests on standard input: {"package": bool, "answers": file, "requests": [...]}."""
    given = json.load(sys.stdin)
    if given["package"]:
        importlib.import_module(PACKAGE)
    else:
        sys.meta_path.insert(0, _Absent())
    answers = [probe(request, given["package"]) for request in given["requests"]]
    Path(given["answers"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
