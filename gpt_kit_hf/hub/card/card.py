"""Model cards: the README.md of a model repository, rendered from what a run recorded and kept as a person edits it.

Generated parts stand between marks, two comments; the opening one has a digest of what was generated. All outside of
them is a person's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.hub.card.facts import card_facts
from gpt_kit_hf.hub.card.metadata import card_data, generated_in, read_metadata, renew_metadata, split_card
from gpt_kit_hf.hub.card.options import as_id
from gpt_kit_hf.hub.card.sections import template_values
from gpt_kit_hf.storage.atomic_files import replace_file, write_synced

__all__ = ["CARD_FILE", "CardWritten", "card_facts", "edited_parts", "render_card", "without_generated", "write_card"]

CARD_FILE = "README.md"

_TEMPLATE = "template.md"
# A part without text: its digest is that of what is generated in the metadata, before the text.
_METADATA = "metadata"
_PARTS = frozenset(
    {"summary", "load", "architecture", "data", "supervision", "evaluation", "curve", "hyperparameters", "command"}
    | {"invariance", "versions", "limits", _METADATA}
)
_PART = re.compile(
    r"<!-- gpt-kit: (?P<name>[a-z]+) (?P<digest>[0-9a-f]{12}) -->"
    r"(?P<text>(?:(?!<!-- /?gpt-kit:).)*)"
    r"<!-- /gpt-kit: (?P=name) -->",
    re.DOTALL,
)
_MARK = re.compile(r"<!-- /?gpt-kit: (?P<name>[a-z]+)\b[^\r\n]*")
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class CardWritten:
    """A card that was written: where, which parts a person had edited inside the marks, and where those are kept."""

    path: Path
    edited: tuple[str, ...]
    kept: Path | None


def render_card(facts: Mapping[str, Any], *, repo: str | None = None, existing: str | None = None) -> str:
    """Return the card that the facts of `card_facts` give: Markdown with metadata before it.

    `repo` is the model's id on the Hub, by default its run's name, in the lines that load it. Of an `existing` card
    only what stands between marks is renewed. A part that was taken out of it with its marks stays away; a card
    without any mark gets all parts at its end. In its metadata ours are renewed, and all others stay.

    Raises UsageError for a `repo` that is no id, for metadata that cannot be read, and for a mark without the other
    one of its pair.
    """
    if repo is not None and as_id(repo) is None:
        raise UsageError(f"repo {repo!r} is no id of the Hub: letters, digits, '-', '_' and '.', with one '/' at most")
    data, parts = card_data(facts), _Parts()
    metadata = read_metadata(data.to_yaml())
    template = resources.files("gpt_kit_hf.hub.card").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    parts.add(_METADATA, "", _metadata_digest(metadata))
    fresh = ModelCard.from_template(
        data, template_str=template, part=parts.from_template, **template_values(facts, repo)
    )
    if existing is None:
        return f"{fresh}\n"
    return _renewed(existing, metadata, parts)


def edited_parts(existing: str) -> list[str]:
    """Return the names of the generated parts of a card that are not as they were generated, in their order.

    "metadata" is among them where the ones of ours were changed. White space at line ends does not count.
    """
    _, block, body = split_card(existing.removeprefix(_BYTE_ORDER_MARK))
    _check_marks(body)
    edited = []
    for match in _PART.finditer(body):
        name, text = match["name"], match["text"]
        digest = _digest(text)
        if name == _METADATA and not text.strip():
            digest = _metadata_digest(read_metadata(block))
        if name in _PARTS and digest != match["digest"]:
            edited.append(name)
    return list(dict.fromkeys(edited))


def without_generated(card: str) -> str:
    """Return what of a card is a person's: metadata and text but for the generated parts, and where these stood."""
    _, block, body = split_card(card.removeprefix(_BYTE_ORDER_MARK))
    metadata = read_metadata(block)
    theirs = {name: value for name, value in metadata.items() if name not in generated_in(metadata)}
    theirs.pop("model-index", None)
    words = _PART.sub(lambda match: f"[{match['name']}]", body).split()
    return json.dumps(theirs, sort_keys=True, default=str) + " ".join(words)


def write_card(run: Path, *, repo: str | None = None) -> CardWritten:
    """Write the card of a run or model folder into it; one that is there is renewed, as by `render_card`.

    Where a person had edited between marks, the card is kept as README.edited-1.md, or the next free number, first.
    Raises what `card_facts` and `render_card` do, and CheckpointError where the disk refuses.
    """
    path = run / CARD_FILE
    before = _read(path)
    edited = [] if before is None else edited_parts(before)
    text = render_card(card_facts(run), repo=repo, existing=before)
    kept = _keep(path) if edited else None
    if text != before:
        replace_file(path, text)
    return CardWritten(path=path, edited=tuple(edited), kept=kept)


class _Parts:
    """The generated parts of a card, by name, each between its marks."""

    def __init__(self) -> None:
        self.by_name: dict[str, str] = {}

    def add(self, name: str, text: str, digest: str) -> None:
        """Put a text between marks, after the parts that are there."""
        self.by_name.pop(name, None)
        lines = f"\n\n{text}\n\n" if text else "\n"
        self.by_name[name] = f"<!-- gpt-kit: {name} {digest} -->{lines}<!-- /gpt-kit: {name} -->"

    def from_template(self, name: str, caller: Callable[[], str]) -> str:
        """Return a part that the template calls for, its blank lines made one."""
        assert name in _PARTS
        if name != _METADATA:
            text = re.sub(r"\n\s*\n", "\n\n", caller().strip())
            assert "<!--" not in text
            self.add(name, text, _digest(text))
        return self.by_name[name]


def _renewed(existing: str, ours: Mapping[str, Any], parts: _Parts) -> str:
    """Return an existing card with its parts and our metadata renewed, in its own line ends."""
    start = _BYTE_ORDER_MARK if existing.startswith(_BYTE_ORDER_MARK) else ""
    opening, block, body = split_card(existing.removeprefix(start))
    _check_marks(body)
    line_end = "\r\n" if "\r\n" in existing else "\n"
    block = renew_metadata(block, ours, line_end)
    parts.add(_METADATA, "", _metadata_digest(read_metadata(block)))
    written = {name: text.replace("\n", line_end) for name, text in parts.by_name.items()}
    if any(match["name"] in _PARTS for match in _PART.finditer(body)):
        body = _PART.sub(lambda match: written.get(match["name"], match[0]), body)
    else:
        gap = line_end if body.endswith(line_end) or not body else 2 * line_end
        body += gap + (2 * line_end).join(written.values()) + line_end
    if not opening:
        opening, body = f"---{line_end}", f"{line_end}---{2 * line_end}{body}"
    return f"{start}{opening}{block}{body}"


def _check_marks(body: str) -> None:
    """Raise UsageError for a mark of ours whose other one is missing: what it holds cannot be told."""
    for match in _MARK.finditer(_PART.sub("", body)):
        name = match["name"]
        if name in _PARTS:
            raise UsageError(
                f"the card has {match[0]} without the other mark of that part: write both, <!-- gpt-kit: {name} ... "
                f"--> and <!-- /gpt-kit: {name} -->, or take this one out, too"
            )


def _digest(text: str) -> str:
    """Return 12 hexadecimal digits of a text, whatever its line ends and the white space before them."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode(errors="replace")).hexdigest()[:12]


def _metadata_digest(metadata: Mapping[str, Any]) -> str:
    return _digest(json.dumps(generated_in(metadata), sort_keys=True, default=str))


def _read(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _keep(path: Path) -> Path:
    """Copy a card under the first free name README.edited-N.md; return it."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.stem}.edited-{number}{path.suffix}")
        try:
            write_synced(kept, path.read_bytes())
        except FileExistsError:
            continue
        except OSError as error:
            raise CheckpointError(f"{kept} was not written: {error}") from error
        return kept
    raise AssertionError("the numbers have no end")
