"""Values as Markdown: the filters of the card's template. Names that a person chose are shown, never interpreted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_kit_hf.hub.card.options import as_id, shareable

_MAX_LISTED = 20
_COMMAND_LINES, _COMMAND_WIDTH = 5, 76
# The groups of options that say on what a run trained, and those that say how.
_DATA = ("text", "rows")
_COMPUTING = ("training", "windows", "supervision", "adapter", "optimizer")


def plain(text: str) -> str:
    """Return a text as Markdown for a line or a table cell in which it is no markup, HTML or mark of a block.

    Rests on CommonMark: a code span is literal, and an entity is a character without a meaning.
    """
    name = shareable(text)
    if not set(name) & set("`|<>&\\"):
        return f"`{name}`"
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in name)


def value(found: Any) -> str:
    """Return the value of an option or field: thousands separated, floats in full, yes or no, a list of texts."""
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, list):
        return listed([plain(each) for each in found])
    if isinstance(found, str):
        return plain(found)
    return f"{found:,}" if isinstance(found, int) else repr(found)


def listed(shown: Sequence[str]) -> str:
    """Return the first 20 of a list of Markdown texts, and how many more there are."""
    more = f" and {len(shown) - _MAX_LISTED} more" if len(shown) > _MAX_LISTED else ""
    return ", ".join(shown[:_MAX_LISTED]) + more


def link(name: str, kind: str = "") -> str:
    """Return a link to a model of the Hub, or to another `kind` such as "datasets/"; a text that is no id as it is."""
    return plain(name) if as_id(name) is None else f"[{name}](https://huggingface.co/{kind}{name})"


def source(found: Mapping[str, Any]) -> str:
    """Return the name of a source of `sources`, as a link if it is on the Hub."""
    return link(found["name"], "datasets/") if "hub" in found else plain(found["name"])


def sources(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a run trained on: name, Hub id, weight in a mixture, and the dataset's configuration and split."""
    found: list[Any] = []
    for option in ("text.text_files", "text.token_files", "text.mixture", "rows.rows"):
        found += [{"name": each} if isinstance(each, str) else each for each in options.get(option, [])]
    found += [options[f"{group}.dataset_name"] for group in _DATA if f"{group}.dataset_name" in options]
    # A run has options of text or of rows.
    details = [options.get(f"{group}.{name}") for name in ("dataset_config", "dataset_train_split") for group in _DATA]
    named = [{**each, "name": each.get("hub") or each.get("name")} for each in found]
    return [{**each, "details": [detail for detail in details if detail and "hub" in each]} for each in named]


def eval_source(options: Mapping[str, Any]) -> str:
    """Return what a run evaluated on: files, a split, or a share of its data; "" if it is not recorded."""
    files = options.get("text.eval_files") or options.get("base.eval_rows")
    if files:
        return value(files)
    if "text.dataset_test_split" in options:
        return f"split {plain(options['text.dataset_test_split'])}"
    share = options.get("text.eval_fraction") or options.get("base.eval_fraction")
    most = options.get("text.eval_max_tokens")
    return "" if share is None else f"{100 * share:g}% of it" + (f", at most {most:,} tokens" if most else "")


def hyperparameters(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say how a run computed, by name, without those that had no effect."""
    shown = {}
    for group in _COMPUTING:
        for name, found in options.items():
            own, _, option = name.partition(".")
            unused = (group == "adapter" and not options.get("adapter.lora_r")) or (
                option.startswith("muon_") and options.get("optimizer.optimizer") != "muon"
            )
            if own == group and not unused:
                shown[option] = found
    dropout = [options[name] for name in ("model.dropout", "base.dropout") if name in options]
    return {**shown, **({"dropout": dropout[0]} if dropout else {})}


def title(name: str) -> str:
    """Return a name as the text of a heading."""
    return name if re.fullmatch(r"[A-Za-z0-9]+(?:[ ._-][A-Za-z0-9]+)*", name) else plain(name)


def repo_name(name: str) -> str:
    """Return a name in the form of a Hub id."""
    return re.sub(r"[^A-Za-z0-9]+$|^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9._-]+|\.{2,}|-{2,}", "-", name)) or "model"


def command_lines(arguments: Sequence[str]) -> str:
    """Return a shell command on at most five lines; quoting keeps each argument as it is and hides marks."""
    words = [_quoted(argument) for argument in arguments]
    width = _COMMAND_WIDTH
    while len(lines := _wrapped(words, width)) > _COMMAND_LINES:
        width += 4
    return " \\\n    ".join(lines)


def _wrapped(words: Sequence[str], width: int) -> list[str]:
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
    escaped = "".join(c if c.isalnum() or c in " .,:;/_+=@%-" else _escaped(c) for c in word)
    return f"$'{escaped}'"


def _escaped(character: str) -> str:
    known = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
    return known.get(character) or "".join(f"\\x{byte:02x}" for byte in character.encode(errors="replace"))
