"""The options of a run as others may see them: known ones, of the right kind, without paths and secrets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from gpt_kit_hf.hub.secret_scan import hide_secrets
from gpt_kit_hf.model.presets import PRESETS
from gpt_kit_hf.training.finetune import FinetuneOptions, finetuning_optimizer
from gpt_kit_hf.training.run_options import FREE_ON_RESUME, RunOptions

_LONGEST_TEXT = 120
# A path from a root, anywhere in a text; elsewhere a stroke is none: an end of documents may be "</doc>".
_PATH = re.compile(r"^(?:[A-Za-z]:)?[\\/~]|(?:^|(?<=[\s'\"=:(,]))(?:[A-Za-z]:[\\/]|~?[\\/][^\s<>]*[\\/])")

# How a text that a person gave is shown: as the last name of a path, as an id of the Hub if it is one, or as it is.
_PATHS = {"text.text_files", "text.eval_files", "rows.rows", "base.eval_rows", "encoding.encoding"}
_PATHS_OR_IDS = {"text.dataset_name", "rows.dataset_name", "base.model_name_or_path"}
_MIXTURE, _DATASET = "text.mixture", "dataset:"
# Words that are known, where the type of an option allows any.
_WORDS = {
    "training.mixed_precision": {"auto", "no", "fp32", "bf16", "fp16"},
    "base.chat_template": {"keep", "default", "alpaca"},
    "model.model": {name for full in PRESETS for name in (full, full.split(" ")[0])},
}


def shareable(text: str) -> str:
    """Return a text, which may be a path, as its last name: of printable characters, not long, without secrets."""
    names = [name for name in re.split(r"[\\/]+", text) if name not in ("", ".", "..", "~")]
    return _harmless(names[-1] if names else "unnamed")


def as_id(text: object) -> str | None:
    """Return a text that has the form of an id of the Hub, None for any other."""
    if not isinstance(text, str) or not text.isascii() or hide_secrets(text) != text:
        return None
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def shared_options(options: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the options of a run, "room.name": value, that say what was computed, fit to be shown.

    A name of a dataset or model is {"hub": id} or {"name": last name of a folder}.
    """
    shown: dict[str, Any] = {}
    for name, (hint, _) in _known_options(tuned="base.model_name_or_path" in options).items():
        value = options.get(name)
        if value is None or name in FREE_ON_RESUME or not _fits(value, hint) or value not in _WORDS.get(name, [value]):
            continue
        if name in _PATHS_OR_IDS:
            shown[name] = _place(value, run, options)
        elif name == _MIXTURE:
            shown[name] = [_mixture_entry(entry, run, options) for entry in value]
        elif isinstance(value, list):
            shown[name] = [_text(name, each) for each in value]
        else:
            shown[name] = _text(name, value) if isinstance(value, str) else value
    return shown


def command_of(chosen: Mapping[str, Any], name: str, *, tuned: bool) -> list[str]:
    """Return the command that trains so again, by what differs from the defaults: a list of arguments."""
    if not chosen:
        return []
    arguments = ["gpt-kit", "finetune" if tuned else "train", "--output_dir", name]
    for option, (_, default) in _known_options(tuned=tuned).items():
        value = chosen.get(option)
        if value is not None and value != default:
            arguments += [f"--{option.partition('.')[2]}", *_as_arguments(value)]
    return arguments


def _as_arguments(value: Any) -> list[str]:
    if isinstance(value, list):
        return [argument for each in value for argument in _as_arguments(each)]
    if isinstance(value, dict):
        weight = f"{value['weight']}:{_DATASET if 'hub' in value else ''}" if "weight" in value else ""
        return [f"{weight}{value.get('hub') or value.get('name')}"]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _known_options(*, tuned: bool) -> dict[str, tuple[Any, Any]]:
    """Return (type, default) of every option of a run, by "room.name"; a default that there is not is None."""
    found: dict[str, tuple[Any, Any]] = {}
    for room, kind in get_type_hints(FinetuneOptions if tuned else RunOptions).items():
        hints = get_type_hints(kind)
        instance = finetuning_optimizer() if tuned and room == "optimizer" else None
        for field in dataclasses.fields(kind):
            found[f"{room}.{field.name}"] = (hints[field.name], _default(field, instance))
    return found


def _default(field: dataclasses.Field[Any], instance: object) -> Any:
    if instance is not None:
        return getattr(instance, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value is of the type that an option has: only such a one was one."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _text(option: str, text: str) -> str:
    # Between documents a line end counts.
    return shareable(text) if option in _PATHS or _PATH.search(text) else _harmless(text, names_only=False)


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
    """Return a name as an id of the Hub, where it can only be that, or as the last name of a folder."""
    found = as_id(name)
    output = options.get("training.output_dir")
    own = PurePath(output).parts if isinstance(output, str) else ()
    beside_the_run = "/" in name and own[:1] == PurePath(name).parts[:1]
    if found is None or beside_the_run or any((folder / name).exists() for folder in _began_in(run, own)):
        return {"name": shareable(name)}
    return {"hub": found}


def _began_in(run: Path, output: tuple[str, ...]) -> Iterator[Path]:
    """Yield the folders that a relative name may be seen from: this one, and the one that the run was begun in."""
    yield Path()
    parts = run.resolve().parts
    if output and not PurePath(*output).is_absolute() and parts[-len(output) :] == output:
        yield Path(*parts[: -len(output)])
