"""The model card: rendered from the facts of a run, and renewed so that hand-written text and edits are kept.

Generated blocks stand between two marks, which are HTML comments; the opening one has a digest of the generated text.
All text outside of them is a person's.
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

import jinja2

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.hub.card import markdown
from gpt_kit_hf.hub.card.facts import card_facts
from gpt_kit_hf.hub.card.metadata import card_data, generated_in, read_metadata, renew_metadata, split_card
from gpt_kit_hf.hub.card.options import as_id
from gpt_kit_hf.storage.atomic_files import replace_file, write_synced

__all__ = ["CARD_FILE", "CardWritten", "card_facts", "edited_blocks", "render_card", "without_generated", "write_card"]

CARD_FILE = "README.md"

_TEMPLATE = resources.files("gpt_kit_hf.hub.card").joinpath("template.md").read_text(encoding="utf-8")
# A block without text: its digest is that of the generated metadata before the text.
_METADATA = "metadata"
_BLOCKS = frozenset({*re.findall(r'call block\("([a-z]+)"\)', _TEMPLATE), _METADATA})
_BLOCK = re.compile(
    r"<!-- gpt-kit: (?P<name>[a-z]+) (?P<digest>[0-9a-f]{12}) -->"
    r"(?P<text>(?:(?!<!-- /?gpt-kit:).)*)"
    r"<!-- /gpt-kit: (?P=name) -->",
    re.DOTALL,
)
_MARK = re.compile(r"<!-- /?gpt-kit: (?P<name>[a-z]+)\b[^\r\n]*")
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class CardWritten:
    """A written card: its path, the generated blocks that had been edited, and the copy that keeps those edits."""

    path: Path
    edited: tuple[str, ...]
    kept: Path | None


def render_card(facts: Mapping[str, Any], *, repo: str | None = None, existing: str | None = None) -> str:
    """Return the card of the facts of `card_facts`: YAML metadata and Markdown.

    `repo` is the model's id in the code that loads it, by default the run's name. Of an `existing` card only the
    generated blocks and generated metadata are replaced; a block that was deleted with its marks stays away, and a
    card without any mark gets all blocks at its end.

    Raises UsageError for a `repo` that is no id, for metadata that cannot be read, and for a mark without its pair.
    """
    if repo is not None and as_id(repo) is None:
        raise UsageError(f"repo {repo!r} is no id of the Hub: letters, digits, '-', '_' and '.', with one '/' at most")
    metadata = card_data(facts).to_yaml()
    blocks: dict[str, str] = {}
    body = _render_body(facts, repo, blocks)
    if existing is not None:
        return _renewed(existing, read_metadata(metadata), blocks)
    return f"---\n{metadata}\n---\n\n{body}\n\n{_metadata_block(metadata)}\n"


def edited_blocks(existing: str) -> list[str]:
    """Return the names, in order, of the generated blocks of a card that have been edited.

    "metadata" is among them if generated metadata were. White space at the ends of lines does not count.
    """
    _, front_matter, body = split_card(existing.removeprefix(_BYTE_ORDER_MARK))
    _check_marks(body)
    edited = []
    for match in _BLOCK.finditer(body):
        name, text = match["name"], match["text"]
        found = _metadata_digest(front_matter) if name == _METADATA and not text.strip() else _digest(text)
        if name in _BLOCKS and found != match["digest"]:
            edited.append(name)
    return list(dict.fromkeys(edited))


def without_generated(card: str) -> str:
    """Return the hand-written metadata and text of a card, with the places of the generated blocks, for comparison."""
    _, front_matter, body = split_card(card.removeprefix(_BYTE_ORDER_MARK))
    metadata = read_metadata(front_matter)
    generated = {*generated_in(metadata), "model-index"}
    own = {name: found for name, found in metadata.items() if name not in generated}
    words = _BLOCK.sub(lambda match: f"[{match['name']}]", body).split()
    return json.dumps(own, sort_keys=True, default=str) + " ".join(words)


def write_card(run: Path, *, repo: str | None = None) -> CardWritten:
    """Write the card of a run or model folder into it; an existing one is renewed as by `render_card`.

    If generated blocks of it were edited, it is first copied to README.edited-1.md, or the next free number. Raises
    the errors of `card_facts` and `render_card`, and CheckpointError for a card that cannot be read or written.
    """
    path = run / CARD_FILE
    try:
        before = path.read_bytes().decode() if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    edited = [] if before is None else edited_blocks(before)
    text = render_card(card_facts(run), repo=repo, existing=before)
    kept = _keep(path) if edited else None
    if text != before:
        replace_file(path, text)
    return CardWritten(path=path, edited=tuple(edited), kept=kept)


def _render_body(facts: Mapping[str, Any], repo: str | None, blocks: dict[str, str]) -> str:
    """Return the text of a new card; its generated blocks, with their marks, are added to `blocks` by name."""

    def block(name: str, caller: Callable[[], str]) -> str:
        text = re.sub(r"\n{3,}", "\n\n", caller().strip())
        assert "<!--" not in text
        lines = f"\n\n{text}\n\n" if text else "\n"
        blocks[name] = f"<!-- gpt-kit: {name} {_digest(text)} -->{lines}<!-- /gpt-kit: {name} -->"
        return blocks[name]

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined)
    filters = (markdown.plain, markdown.value, markdown.listed, markdown.link, markdown.source, markdown.command_lines)
    environment.filters |= {each.__name__: each for each in filters}
    options = facts.get("options", {})
    groups = ("architecture", "tokenizer", "base", "data", "supervision", "progress", "evaluations", "invariance")
    return environment.from_string(_TEMPLATE).render(
        {name: facts.get(name, {}) for name in (*groups, "versions", "command")}
        | {name: facts.get(name) for name in ("kind", "parameters", "curve")},
        title=markdown.title(facts["name"]),
        repo=repo or markdown.repo_name(facts["name"]),
        sources=markdown.sources(options),
        eval_source=markdown.eval_source(options),
        lora_r=options.get("adapter.lora_r"),
        hyperparameters=markdown.hyperparameters(options),
        block=block,
    )


def _renewed(existing: str, generated: Mapping[str, Any], blocks: Mapping[str, str]) -> str:
    """Return an existing card with its blocks and generated metadata replaced, in its own line endings."""
    start = _BYTE_ORDER_MARK if existing.startswith(_BYTE_ORDER_MARK) else ""
    opening, front_matter, body = split_card(existing.removeprefix(start))
    _check_marks(body)
    line_end = "\r\n" if "\r\n" in existing else "\n"
    front_matter = renew_metadata(front_matter, generated, line_end)
    written = {name: text.replace("\n", line_end) for name, text in blocks.items()}
    written[_METADATA] = _metadata_block(front_matter).replace("\n", line_end)
    if any(match["name"] in _BLOCKS for match in _BLOCK.finditer(body)):
        body = _BLOCK.sub(lambda match: written.get(match["name"], match[0]), body)
    else:
        gap = line_end if body.endswith(line_end) or not body else 2 * line_end
        body += gap + (2 * line_end).join(written.values()) + line_end
    if not opening:
        opening, body = f"---{line_end}", f"{line_end}---{2 * line_end}{body}"
    return f"{start}{opening}{front_matter}{body}"


def _check_marks(body: str) -> None:
    """Raise UsageError for a mark of a block whose other mark is missing: the block's extent is unknown."""
    for match in _MARK.finditer(_BLOCK.sub("", body)):
        name = match["name"]
        if name in _BLOCKS:
            raise UsageError(
                f"the card has {match[0]} without the other mark of that block: write both, <!-- gpt-kit: {name} ... "
                f"--> and <!-- /gpt-kit: {name} -->, or delete this one, too"
            )


def _digest(text: str) -> str:
    """Return 12 hexadecimal digits of a text without the white space at the ends of its lines."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode(errors="replace")).hexdigest()[:12]


def _metadata_digest(front_matter: str) -> str:
    return _digest(json.dumps(generated_in(read_metadata(front_matter)), sort_keys=True, default=str))


def _metadata_block(front_matter: str) -> str:
    return f"<!-- gpt-kit: {_METADATA} {_metadata_digest(front_matter)} -->\n<!-- /gpt-kit: {_METADATA} -->"


def _keep(path: Path) -> Path:
    """Copy a card to the first free name README.edited-N.md; return it."""
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
