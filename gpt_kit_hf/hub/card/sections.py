"""The texts and tables of a card, as Markdown in which what a person named can do nothing but be read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from gpt_kit_hf.hub.card.options import as_id, shareable

T = TypeVar("T")

_MOST_SHOWN = 20
_COMMAND_LINES, _COMMAND_WIDTH = 5, 76
_ARCHITECTURE = {
    "class": "class",
    "n_layer": "layers",
    "n_head": "attention heads",
    "n_embd": "width",
    "n_inner": "width inside the feed-forward layers",
    "max_position_embeddings": "context (tokens)",
    "vocab_size": "vocabulary",
    "hidden_act": "activation",
    "position_embedding": "position embedding",
    "use_bias": "biases",
    "tie_word_embeddings": "output projection shares the embedding",
    "embd_pdrop": "dropout of embeddings",
    "attn_pdrop": "dropout of attention",
    "resid_pdrop": "dropout of residuals",
    "layer_norm_epsilon": "epsilon of the norms",
    "dtype": "weights stored in",
}
_SUPERVISION = {
    "rows_read": "rows read",
    "rows_used": "rows used",
    "rows_truncated": "rows whose prompt lost its beginning",
    "tokens": "tokens",
    "tokens_trained": "tokens trained",
    "ends_trained": "ends of text trained",
    "rows_without_label": "rows without a trained token",
    "rows_end_untrained": "rows whose end is not trained",
    "rows_prompt_trained": "rows whose prompt is trained",
}
# The rooms of a run that say how it was computed, in their order; the others say what on.
_ROOMS = ("training", "windows", "supervision", "adapter", "optimizer")


def plain(text: str) -> str:
    """Return a text as Markdown, for a line or a cell of a table, that shows it and is no markup, mark or HTML.

    Rests on CommonMark: a code span is literal, and an entity is a character that means nothing else.
    """
    name = shareable(text)
    if not set(name) & set("`|<>&\\"):
        return f"`{name}`"
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in name)


def template_values(facts: Mapping[str, Any], repo: str | None) -> dict[str, Any]:
    """Return what the template asks for; a section of which nothing is known is empty."""
    architecture, progress = facts.get("architecture", {}), facts.get("progress", {})
    tokenizer, options = facts.get("tokenizer", {}), facts.get("options", {})
    name, context = facts["name"], architecture.get("max_position_embeddings")
    own: Mapping[str, Any] = next((each for each in facts.get("evaluations", []) if each.get("own")), {})
    return {
        "title": name if re.fullmatch(r"[A-Za-z0-9]+(?:[ ._-][A-Za-z0-9]+)*", name) else plain(name),
        "repo": repo or repo_name(name),
        "kind": facts["kind"],
        "model": f"A GPT of {number(facts['parameters'])} parameters" if "parameters" in facts else "A causal GPT",
        "own_class": architecture.get("model_type") == "gpt_kit",
        "base": _base(facts.get("base", {})),
        "sources": _linked_sources(options) or "what is not recorded",
        "lora_r": options.get("adapter.lora_r"),
        "unfinished": _unfinished(progress),
        "ask": _ask(tokenizer),
        "new_tokens": min(100, (context or 200) // 2),
        "architecture": _architecture(facts),
        "data": _data(facts),
        "supervision": _supervision(facts.get("supervision", {})),
        "evaluation": _evaluation(facts.get("evaluations", [])),
        "before": _score(progress.get("before")),
        "beside": ", ".join(f"{name} {value:.3f}" for name, value in own.get("beside", {}).items()),
        "curve": "loss.png" if facts.get("curve") else "",
        "computed": _computed(progress),
        "hyperparameters": _hyperparameters(options),
        "command": command_lines(facts.get("command", [])),
        "invariance": _invariance(facts.get("invariance", {})),
        "invariance_setting": _invariance_setting(facts.get("invariance", {})),
        "versions": table(("package", "version"), list(facts.get("versions", {}).items())),
        "knows": _knows(facts),
        "context": number(context) if context else "",
        "no_padding": tokenizer.get("pads") is False,
    }


def repo_name(name: str) -> str:
    """Return a name in the form of an id of the Hub."""
    return re.sub(r"[^A-Za-z0-9]+$|^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9._-]+|\.{2,}|-{2,}", "-", name)) or "model"


def sources(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was trained on: of each source its name, its id if it is on the Hub, and its weight in a mixture."""
    found: list[Any] = []
    for option in ("text.text_files", "text.mixture", "rows.rows"):
        found += [{"name": each} if isinstance(each, str) else each for each in options.get(option, [])]
    for option in ("text.dataset_name", "rows.dataset_name"):
        found += [options[option]] if option in options else []
    return [{**each, "name": each.get("hub") or each.get("name")} for each in found]


def number(value: float | int | bool | str) -> str:
    """Return a value as it is read best: thousands apart, a float to the last digit that matters, yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return plain(value)
    return f"{value:,}" if isinstance(value, int) else repr(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, or nothing where there are no rows. Cells are Markdown of one line without a bar."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    assert not any("\n" in cell or "|" in cell for line in lines for cell in line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command_lines(arguments: Sequence[str]) -> str:
    """Return a shell command on five lines at the most, each word of it what it was, none of them a mark."""
    words = [_quoted(argument) for argument in arguments]
    width = _COMMAND_WIDTH
    while len(lines := _filled(words, width)) > _COMMAND_LINES:
        width += 4
    return " \\\n    ".join(lines)


def _filled(words: Sequence[str], width: int) -> list[str]:
    lines: list[str] = []
    for word in words:
        # An option stays on the line of its first value.
        if lines and (len(lines[-1]) + 1 + len(word) <= width or lines[-1].rpartition(" ")[2].startswith("--")):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _quoted(word: str) -> str:
    if word.isprintable() and "<!--" not in word and "-->" not in word and "`" not in word:
        return shlex.quote(word)
    escaped = "".join(c if c.isalnum() or c in " .,:;/_+=@%-" else _as_bytes(c) for c in word)
    return f"$'{escaped}'"


def _as_bytes(character: str) -> str:
    known = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
    return known.get(character) or "".join(f"\\x{byte:02x}" for byte in character.encode(errors="replace"))


# --- the sections


def _base(base: Mapping[str, Any]) -> str:
    name = base.get("name") or "a model"
    commit = f" at commit `{base['commit']}`" if base.get("commit") else ""
    return _link(name) + commit if base.get("hub") else plain(name)


def _link(name: str, kind: str = "") -> str:
    # What has the form of an id cannot end the link.
    return plain(name) if as_id(name) is None else f"[{name}](https://huggingface.co/{kind}{name})"


def _linked_sources(options: Mapping[str, Any]) -> str:
    return _listed(sources(options), _named)


def _named(source: Mapping[str, Any]) -> str:
    return _link(source["name"], "datasets/") if "hub" in source else plain(source["name"])


def _unfinished(progress: Mapping[str, Any]) -> str:
    if not progress or progress.get("finished"):
        return ""
    total = progress.get("steps")
    return f"{progress.get('done', 0):,}" + (f" of {total:,}" if total is not None else "")


def _ask(tokenizer: Mapping[str, Any]) -> str:
    if not tokenizer.get("chat"):
        return 'ids = tokenizer("The", return_tensors="pt")'
    asked = '[{"role": "user", "content": "Hello"}]'
    options = 'add_generation_prompt=True, return_tensors="pt"'
    return f"ids = tokenizer.apply_chat_template({asked}, {options})"


def _architecture(facts: Mapping[str, Any]) -> str:
    known = facts.get("architecture", {})
    rows = [["parameters", number(facts["parameters"])]] if "parameters" in facts else []
    rows += [[label, number(known[name])] for name, label in _ARCHITECTURE.items() if name in known]
    return table(("", "value"), rows)


def _data(facts: Mapping[str, Any]) -> str:
    counts, options, tokenizer = facts.get("data", {}), facts.get("options", {}), facts.get("tokenizer", {})
    found = sources(options)
    rows = [["trained on", _source(source, options)] for source in found[:_MOST_SHOWN]]
    rows += [["", f"and {len(found) - _MOST_SHOWN} more"]] if len(found) > _MOST_SHOWN else []
    rows += [["held out", held_out] for held_out in _held_out(options)]
    labels = {
        "documents": "documents",
        "train_tokens": "tokens to train on",
        "held_out_tokens": "tokens held out",
        "held_out_rows": "rows held out",
    }
    rows += [[label, number(counts[name])] for name, label in labels.items() if name in counts]
    rows += [["fingerprint of the data", f"`{counts['fingerprint']}`"]] if "fingerprint" in counts else []
    rows += [["tokenizer", plain(tokenizer["name"])]] if tokenizer.get("name") else []
    rows += [["fingerprint of the tokenizer", f"`{tokenizer['fingerprint']}`"]] if tokenizer.get("fingerprint") else []
    return table(("", "value"), rows)


def _source(source: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    shown = _named(source)
    if source["name"] == "python-stdlib":
        shown += ", the source of the Python that ran"
    if "weight" in source:
        shown += f", weight {source['weight']:g}"
    if "hub" in source:
        parts = [options.get(name) for name in ("text.dataset_config", "rows.dataset_config")]
        parts += [options.get("text.dataset_train_split") or options.get("rows.dataset_train_split")]
        shown += "".join(f", {plain(part)}" for part in parts if part)
    return shown


def _held_out(options: Mapping[str, Any]) -> list[str]:
    files = options.get("text.eval_files") or options.get("base.eval_rows")
    if files:
        return [_listed(files, plain)]
    if "text.dataset_test_split" in options:
        return [f"split {plain(options['text.dataset_test_split'])}"]
    share = options.get("text.eval_fraction") or options.get("base.eval_fraction")
    if share is None:
        return []
    most = options.get("text.eval_max_tokens")
    return [f"{100 * share:g}% of it" + (f", at most {most:,} tokens" if most else "")]


def _supervision(counts: Mapping[str, Any]) -> str:
    rows = [[label, number(counts[name])] for name, label in _SUPERVISION.items() if name in counts]
    for name in ("skipped", "dropped"):
        rows += [[f"rows {name}: {plain(kind)}", number(count)] for kind, count in counts.get(name, {}).items()]
    return table(("", "count"), rows)


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> str:
    header = ("scored on", "loss", "perplexity", "bits per byte", "tokens", "bytes", "windows", "fingerprint")
    rows = []
    for each in evaluations:
        fingerprint = each.get("data_fingerprint")
        rows.append(
            [
                plain(each["name"]),
                f"{each['loss']:.4f}",
                f"{each['perplexity']:,.2f}" if "perplexity" in each else "",
                f"{each['bits_per_byte']:.4f}" if "bits_per_byte" in each else "",
                *(number(each[name]) if name in each else "" for name in ("tokens", "text_bytes")),
                _windows(each),
                f"`{fingerprint}`" if fingerprint else "",
            ]
        )
    return table(header, rows)


def _windows(evaluation: Mapping[str, Any]) -> str:
    length, stride = evaluation.get("max_length"), evaluation.get("stride")
    if length is None:
        return ""
    return number(length) + ("" if stride in (None, length) else f", {stride:,} apart")


def _score(score: Mapping[str, Any] | None) -> str:
    return f"{score['loss']:.4f} nats a token, {score['bits_per_byte']:.4f} bits per byte" if score else ""


def _computed(progress: Mapping[str, Any]) -> str:
    """Return how far the training came and where, in a sentence or two."""
    said = f"{progress.get('done', 0):,} steps over {progress.get('trained_tokens', 0):,} trained tokens"
    where = [progress[name] for name in ("precision", "device") if name in progress]
    if "processes" in progress:
        where.append(f"{progress['processes']} process{'es' if progress['processes'] != 1 else ''}")
    said += f" ({', '.join(where)})." if where else "."
    if progress.get("skipped"):
        said += f" {progress['skipped']:,} updates were skipped."
    if progress.get("sessions", 1) > 1:
        said += f" The run was continued: it had {progress['sessions']:,} sessions."
    return said


def _hyperparameters(options: Mapping[str, Any]) -> str:
    rows = []
    for room in _ROOMS:
        for name, value in options.items():
            own, _, option = name.partition(".")
            without_adapter = room == "adapter" and not options.get("adapter.lora_r")
            other_optimizer = option.startswith("muon_") and options.get("optimizer.optimizer") != "muon"
            if own == room and not without_adapter and not other_optimizer:
                rows.append([f"`{option}`", _listed(value, plain) if isinstance(value, list) else number(value)])
    for option in ("model.dropout", "base.dropout"):
        rows += [["`dropout`", number(options[option])]] if option in options else []
    return table(("option", "value"), rows)


def _invariance(found: Mapping[str, Any]) -> str:
    header = ("precision", "attention", "cells that hold", "largest difference", "allowed")
    rows = []
    for row in found.get("rows", []):
        difference, allowed = row.get("difference"), found["tolerances"].get(row["precision"])
        rows.append(
            [
                row["precision"],
                f"`{row['attention']}`",
                f"{row['holds']} of {row['cells']}",
                "no finite logits" if difference is None else f"{difference:.1e}",
                "" if allowed is None else f"{allowed:.1e}",
            ]
        )
    return table(header, rows)


def _invariance_setting(found: Mapping[str, Any]) -> str:
    versions = [f"{name} {found[name]}" for name in ("torch", "transformers") if found.get(name)]
    where = [*([f"on {found['device']}"] if found.get("device") else []), *versions]
    return f"Measured {', '.join(where)}." if where else ""


def _knows(facts: Mapping[str, Any]) -> str:
    options, counts = facts.get("options", {}), facts.get("data", {})
    named = _linked_sources(options)
    if facts["kind"] == "tuned":
        rows = facts.get("supervision", {}).get("rows_used")
        return f"{rows:,} rows of {named}, and before that what its base was trained on" if rows and named else ""
    tokens = counts.get("train_tokens")
    return f"{tokens:,} tokens of {named}" if tokens and named else named


def _listed(values: Sequence[T], shown_as: Callable[[T], str]) -> str:
    shown = [shown_as(value) for value in values]
    more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return ", ".join(shown[:_MOST_SHOWN]) + more
