"""The options that a card may show of a run: declared ones, valid, without paths and secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from gpt_kit_hf.hub.secret_scan import hide_secrets
from gpt_kit_hf.options.declare import Option, flat_declarations
from gpt_kit_hf.options.run import FinetuneOptions, RunOptions

_LONGEST_TEXT = 120
# An absolute path anywhere in a text. Any other slash is allowed: a document separator may be "</doc>".
_PATH = re.compile(r"^(?:[A-Za-z]:)?[\\/~]|(?:^|(?<=[\s'\"=:(,]))(?:[A-Za-z]:[\\/]|~?[\\/][^\s<>]*[\\/])")

_DATASET = "dataset:"

# The option that names the model that was trained further, by the kind of the run.
BASE_OPTIONS = {"tuned": "base.model_name_or_path", "continued": "model.model_name_or_path"}


def shareable(text: str) -> str:
    """Return a text, or the last name of a path: printable, of at most 120 characters, without secrets."""
    names = [name for name in re.split(r"[\\/]+", text) if name not in ("", ".", "..", "~")]
    return _harmless(names[-1] if names else "unnamed")


def as_id(text: object) -> str | None:
    """Return a text that has the form of a Hub id, None for any other value."""
    if not isinstance(text, str) or not text.isascii() or hide_secrets(text) != text:
        return None
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def kind_of(options: Mapping[str, Any]) -> str:
    """Return what a run with these options made: a "tuned", "continued" or "pretrained" model; "model" for none."""
    if BASE_OPTIONS["tuned"] in options:
        return "tuned"
    if options.get(BASE_OPTIONS["continued"]) is not None:
        return "continued"
    return "pretrained" if options else "model"


def shared_options(options: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the options, "group.name": value, that a card may show, each valid and without a path.

    A dataset or model is {"hub": id} or {"name": last name of a folder}.
    """
    shown: dict[str, Any] = {}
    for name, declared in _known_options(tuned=kind_of(options) == "tuned").items():
        value = options.get(name)
        if value is None or declared.card == "hidden" or not declared.fits(value):
            continue
        if declared.card == "path_or_id":
            shown[name] = _place(value, run, options)
        elif declared.card == "mixture":
            shown[name] = [_mixture_entry(entry, run, options) for entry in value]
        elif isinstance(value, list):
            shown[name] = [_text(declared, each) for each in value]
        else:
            shown[name] = _text(declared, value) if isinstance(value, str) else value
    return shown


def command_of(chosen: Mapping[str, Any], name: str, *, tuned: bool) -> list[str]:
    """Return the arguments of the command that repeats the training: the options that are not at their defaults."""
    if not chosen:
        return []
    arguments = ["gpt-kit", "finetune" if tuned else "train", "--output_dir", name]
    for option, declared in _known_options(tuned=tuned).items():
        value = chosen.get(option)
        # The optimizer always, as what it is by default depends on other options.
        if value is not None and (declared.required or value != declared.default or declared.name == "optimizer"):
            arguments += [f"--{option.partition('.')[2]}", *_as_arguments(value)]
    return arguments


def _as_arguments(value: Any) -> list[str]:
    if isinstance(value, list):
        return [argument for each in value for argument in _as_arguments(each)]
    if isinstance(value, dict):
        weight = f"{value['weight']}:{_DATASET if 'hub' in value else ''}" if "weight" in value else ""
        return [f"{weight}{value.get('hub') or value.get('name')}"]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _known_options(*, tuned: bool) -> dict[str, Option]:
    """Return the declarations of all options of a run, by "group.name"."""
    return flat_declarations(FinetuneOptions if tuned else RunOptions)


def _text(option: Option, text: str) -> str:
    # Not as a name: white space counts in a document separator.
    return shareable(text) if option.card == "path" or _PATH.search(text) else _harmless(text, names_only=False)


def _harmless(text: str, *, names_only: bool = True) -> str:
    kept = " ".join("".join(c if c.isprintable() else " " for c in text).split()) if names_only else text
    kept = hide_secrets(kept) or "unnamed"
    return kept if len(kept) <= _LONGEST_TEXT else f"{kept[: _LONGEST_TEXT - 1]}…"


def _mixture_entry(entry: str, run: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    weight, _, place = entry.partition(":")
    try:
        share = float(weight)
    except ValueError:
        return {"name": shareable(entry)}
    if place.startswith(_DATASET):
        return {"weight": share, **_place(place.removeprefix(_DATASET), run, options)}
    return {"weight": share, "name": shareable(place)}


def _place(name: str, run: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Return {"hub": id} if the name can only be a Hub id, otherwise {"name": last name of a folder}."""
    found = as_id(name)
    output = options.get("training.output_dir")
    own = PurePath(output).parts if isinstance(output, str) else ()
    in_same_folder = "/" in name and own[:1] == PurePath(name).parts[:1]
    if found is None or in_same_folder or any((folder / name).exists() for folder in _start_folders(run, own)):
        return {"name": shareable(name)}
    return {"hub": found}


def _start_folders(run: Path, output: tuple[str, ...]) -> Iterator[Path]:
    """Yield the folders that a relative name may be relative to: this one, and the one the run was started in."""
    yield Path()
    parts = run.resolve().parts
    if output and not PurePath(*output).is_absolute() and parts[-len(output) :] == output:
        yield Path(*parts[: -len(output)])
