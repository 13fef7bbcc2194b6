"""What the template of a report shows of a run, from the facts of its card: nothing else of the machine is in them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from gpt_kit_hf.hub.card.markdown import command_lines, sources
from gpt_kit_hf.storage.run_history import RunHistory
from gpt_kit_hf.text import duration, short

_MOST_SAMPLES = 24
_ARCHITECTURE = {
    "class": "class",
    "n_layer": "layers",
    "n_head": "attention heads",
    "num_key_value_heads": "key and value heads",
    "n_embd": "width",
    "n_inner": "width of the feed-forward layers",
    "max_position_embeddings": "context (tokens)",
    "vocab_size": "vocabulary",
    "mlp": "feed-forward layers",
    "hidden_act": "activation",
    "norm": "norm",
    "position_embedding": "positions",
    "use_bias": "biases",
    "tie_word_embeddings": "output projection tied to the embedding",
    "dtype": "dtype of the weights",
}
_DATA = {
    "documents": "documents",
    "train_tokens": "tokens to train on",
    "eval_tokens": "tokens held out",
    "eval_rows": "rows held out",
    "fingerprint": "fingerprint of the data",
}
_TOKENIZER = {"name": "tokenizer", "fingerprint": "fingerprint of the tokenizer"}
# What was done to random weights, or to the base model, with which data.
_KINDS = {
    "pretrained": "trained from random weights on {data}",
    "continued": "{base} trained further on {data}",
    "tuned": "{base} tuned on the instruction rows of {data}",
}
_STATES = {
    "running": "It is still training",
    "interrupted": "It was interrupted",
    "failed": "It stopped with an error",
}


def values(run: RunHistory, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the template that do not need the model."""
    name = facts["name"]
    samples = [
        {"step": f"{each.step:,}", "prompt": each.prompt, "text": _continued(each.prompt, each.text)}
        for each in _spread(run.samples, _MOST_SAMPLES)
    ]
    return {
        "name": name,
        "shell_name": shlex.quote(name),
        "lead": _lead(run, facts),
        "error": run.error.partition(":")[0] if run.error else None,  # the message may hold a path
        "tiles": list(_tiles(run, facts)),
        "samples": samples,
        "samples_left": len(run.samples) - len(samples),
        "scores": list(_scores(facts)),
        "data": list(_data(facts)),
        "architecture": list(_architecture(facts)),
        "options": [(option, _value(value)) for option, value in facts.get("options", {}).items()],
        "command": command_lines(facts["command"]) if facts.get("command") else "",
        "invariance": list(_invariance(facts)),
        "commands": "\n".join(_commands(name, facts)),
        "code": _code(name, facts),
        "computing": list(_computing(run, facts)),
    }


def _lead(run: RunHistory, facts: Mapping[str, Any]) -> str:
    parameters = f" with {short(facts['parameters'])} parameters" if facts.get("parameters") else ""
    named = [each["name"] for each in sources(facts.get("options", {}))]
    data = ", ".join(named[:3]) + (" and more" if len(named) > 3 else "") if named else "data that is not recorded"
    base = (facts.get("base") or {}).get("name") or "a model"
    made = _KINDS.get(facts["kind"], "trained on {data}").format(base=base, data=data)
    lead = f"A language model{parameters}: {made}, {run.trained_tokens:,} tokens in {run.steps_done:,} steps."
    if run.state in _STATES:
        of = f" of {run.steps_planned:,}" if run.steps_planned else ""
        lead += f" {_STATES[run.state]} after step {run.steps_done:,}{of}."
    own = next((each for each in facts.get("evaluations", []) if each.get("own")), None)
    if own and "bits_per_byte" in own:
        unseen = "answers" if facts["kind"] == "tuned" else "text"
        lead += f" On {unseen} that it was not trained on it needs {own['bits_per_byte']:.3f} bits for each byte"
        beside = ", ".join(f"{name}: {bits:.3f}" for name, bits in own.get("beside", {}).items())
        lead += f" ({beside})." if beside else "."
    return lead


def _tiles(run: RunHistory, facts: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    loss, bits = run.series["eval_loss"].last, run.series["bits_per_byte"].last
    if math.isfinite(loss):
        yield {"name": "Held-out loss", "value": f"{loss:.4f}", "note": "nats per token"}
        yield {"name": "Perplexity", "value": f"{math.exp(min(loss, 700)):.4g}", "note": "tokens as hard to guess"}
    if math.isfinite(bits):
        yield {"name": "Bits per byte", "value": f"{bits:.4f}", "note": "of held-out text"}
    if run.best is not None:
        yield {"name": "Best checkpoint", "value": f"{run.best[0]:,}", "note": f"step; loss {run.best[1]:.4f}"}
    yield {
        "name": "Steps",
        "value": f"{run.steps_done:,}",
        "note": f"of {run.steps_planned:,}" * bool(run.steps_planned),
    }
    yield {"name": "Trained tokens", "value": short(run.trained_tokens), "note": ""}
    if facts.get("parameters"):
        yield {"name": "Parameters", "value": short(facts["parameters"]), "note": f"{facts['parameters']:,}"}
    if math.isfinite(run.elapsed.last):
        yield {"name": "Time", "value": duration(run.elapsed.last), "note": "of training"}


def _scores(facts: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for each in facts.get("evaluations", []):
        cells = [_number(each.get(name), form) for name, form in (("loss", ".4f"), ("perplexity", ".3f"))]
        counts = [_number(each.get(name), ",") for name in ("tokens", "text_bytes")]
        yield {"name": each["name"], "cells": [*cells, _number(each.get("bits_per_byte"), ".4f"), *counts]}
        for name, bits in each.get("beside", {}).items():
            yield {"name": f"{name}, on the same text", "cells": ["", "", f"{bits:.4f}", "", ""]}


def _data(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    options, found = facts.get("options", {}), facts.get("data", {})
    for each in sources(options):
        weight = f", weight {each['weight']:g}" if "weight" in each else ""
        details = "".join(f", {detail}" for detail in each["details"])
        yield "trained on", f"{each['name']}{weight}{details}"
    if files := options.get("text.eval_files") or options.get("base.eval_rows"):
        yield "held out", _value(files)
    elif share := options.get("text.eval_fraction") or options.get("base.eval_fraction"):
        yield "held out", f"{100 * share:g}% of it"
    yield from ((label, _value(found[name])) for name, label in _DATA.items() if name in found)
    for group, of in (("text_read", ""), ("eval_text_read", ", of the evaluation text")):
        for kind in ("left_out", "replaced_characters"):
            for reason, count in (found.get(group, {}).get(kind) or {}).items():
                yield f"{kind.replace('_', ' ')}{of}: {reason}", _value(count)
    for name, value in facts.get("supervision", {}).items():
        if isinstance(value, int):
            yield name.replace("_", " "), _value(value)
    tokenizer = facts.get("tokenizer", {})
    yield from ((label, tokenizer[name]) for name, label in _TOKENIZER.items() if name in tokenizer)


def _architecture(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    found = facts.get("architecture", {})
    if facts.get("parameters"):
        yield "parameters", _value(facts["parameters"])
    yield from ((label, _value(found[name])) for name, label in _ARCHITECTURE.items() if name in found)


def _invariance(facts: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    found = facts.get("invariance") or {}
    for row in found.get("rows", []):
        difference, allowed = row["difference"], found.get("tolerances", {}).get(row["precision"])
        yield {
            "precision": row["precision"],
            "attention": row["attention"],
            "holds": f"{row['holds']:,}",
            "cells": f"{row['cells']:,}",
            "difference": "no finite logits" if difference is None else f"{difference:.1e}",
            "allowed": _number(allowed, ".1e"),
        }


def _commands(name: str, facts: Mapping[str, Any]) -> Iterable[str]:
    place = shlex.quote(name if not name.startswith("-") else f"./{name}")
    chats = facts["kind"] == "tuned" or facts.get("tokenizer", {}).get("chat")
    yield f"gpt-kit chat {place}" if chats else f'gpt-kit generate {place} --prompt "The"'
    yield f"gpt-kit play {place}  # what it expects at each token, on a page"
    yield f"gpt-kit evaluate {place} my-text.txt"
    yield f"gpt-kit serve {place}  # an OpenAI-compatible API"
    yield f"gpt-kit push {place} your-name/your-model"


def _code(name: str, facts: Mapping[str, Any]) -> str:
    architecture = facts.get("architecture", {})
    own, context = architecture.get("model_type") == "gpt_kit", architecture.get("max_position_embeddings") or 200
    chat = facts.get("tokenizer", {}).get("chat")
    ask = (
        'tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
        'return_tensors="pt", return_dict=True)'
        if chat
        else 'tokenizer("The", return_tensors="pt")'
    )
    lines = ["import gpt_kit_hf"] if own else []
    return "\n".join(
        [
            *lines,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})",
            f"inputs = {ask}",
            f"ids = model.generate(**inputs, max_new_tokens={min(100, context // 2)}, do_sample=True)",
            "print(tokenizer.decode(ids[0]))",
        ]
    )


def _computing(run: RunHistory, facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    progress = facts.get("progress", {})
    for name in ("precision", "device", "processes", "sessions"):
        if name in progress:
            yield name, _value(progress[name])
    yield "skipped updates", f"{run.skipped:,}"
    speed = run.series["tokens_per_second"].last
    if math.isfinite(speed):
        yield "last speed", f"{short(speed)} tokens/s"
    memory = run.series["memory_bytes"].last
    if math.isfinite(memory):
        yield "peak memory", f"{memory / 2**20:,.0f} MiB"
    yield from facts.get("versions", {}).items()


def _continued(prompt: str, text: str) -> str:
    """Return a sample without its prompt, with which the text of a base model begins."""
    return text.removeprefix(prompt)


def _spread(items: tuple[Any, ...], most: int) -> list[Any]:
    """Return at most `most` of the items, evenly, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else ""


def _value(value: Any) -> str:
    """Return the value of an option or a field as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, Mapping):
        weight = f"{value['weight']:g}:" if "weight" in value else ""
        return f"{weight}{value.get('hub') or value.get('name')}"
    return f"{value:,}" if isinstance(value, int) else str(value)
