"""What is shown of the declarations: `--help`, a complete configuration file, and the tables of the documentation."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from textwrap import TextWrapper
from typing import Any

from gpt_kit_hf.options.declare import Option, Section, recipe_of, sections_of

_COLUMN = 30
_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text"}
_RESUME = {"fixed": "no", "allowed": "with `allow_changes`", "text": "with `allow_changes text`", "free": "yes"}


def placeholder(option: Option) -> str:
    """Return what stands for an option's value: FILE, INTEGER, true|false, TEXT ..."""
    name = option.metavar or ("|".join(option.choices) if 0 < len(option.choices) < 4 else "")
    name = name or {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT"}[option.type]
    return f"{name} ..." if option.is_list else name


def default_text(option: Option) -> str:
    """Return an option's default in words."""
    if option.required:
        return "required"
    if option.shown:
        return option.shown
    if option.default is None:
        return option.unset
    return _value_text(option.default) or "empty"


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(_value_text, value)) if isinstance(value, (list, tuple)) else str(value)


def explanation(option: Option) -> str:
    """Return an option's help with its choices and default."""
    facts = [f"choices: {', '.join(option.choices)}"] if option.choices else []
    facts.append("required" if option.required else f"default: {default_text(option)}")
    return f"{option.help} ({'; '.join(facts)})"


def title(section: Section) -> str:
    """Return the first line of an option class's docstring."""
    return (section.kind.__doc__ or "").splitlines()[0].rstrip(".")


def _sections_shown(kind: type) -> Mapping[str, Section]:
    """Return the sections of a command's options, with its recipe and the defaults that this sets."""
    sections, recipe = sections_of(kind), recipe_of(kind)
    if recipe is None:
        return sections
    section, found = sections[recipe.section], recipe.values({})
    shown = {
        name: dataclasses.replace(each, shown=f"{found[name]}; {default_text(each)} with recipe plain")
        for name, each in section.options.items()
        if name in found and found[name] != each.default
    }
    options = {recipe.option.name: recipe.option, **section.options, **shown}
    return {**sections, recipe.section: dataclasses.replace(section, options=options)}


def help_page(prog: str, about: str, kind: type, general: Iterable[Option]) -> str:
    """Return what `--help` prints: every option, by option class."""
    sections, positionals = _sections_shown(kind), getattr(kind, "positionals", ())
    known = {name: each for section in sections.values() for name, each in section.options.items()}
    named = [_positional(known[name]) for name in positionals]
    lines = [f"usage: {' '.join([prog, *named, '[--name value ...]'])}", "", *_wrapped(about, _width())]
    if positionals:
        lines += ["", "Arguments (may also be given by name, --name value):"]
        for name in positionals:
            lines += _entry(f"{placeholder(known[name])}", f"{name}: {explanation(known[name])}")
    for section in sections.values():
        options = [each for name, each in section.options.items() if name not in positionals]
        lines += ["", *_wrapped(f"{title(section)}:", _width()), *_entries(options)]
    lines += ["", "General:", *_entries(general), ""]
    note = "--name=value works too, dashes count as underscores, and --no_name is --name false."
    return "\n".join([*lines, *_wrapped(note, _width()), ""])


def _positional(option: Option) -> str:
    return placeholder(option) if option.required else f"[{placeholder(option)}]"


def _entries(options: Iterable[Option]) -> list[str]:
    lines = []
    for each in options:
        value = "" if each.type is bool else f" {placeholder(each)}"
        lines += _entry(f"--{each.name}{value}", explanation(each))
    return lines


def _entry(left: str, right: str) -> list[str]:
    wrapped = _wrapped(right, _width() - _COLUMN)
    if len(left) + 4 > _COLUMN:
        return [f"  {left}", *(" " * _COLUMN + line for line in wrapped)]
    return [f"  {left}".ljust(_COLUMN) + wrapped[0], *(" " * _COLUMN + line for line in wrapped[1:])]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    wrapper = TextWrapper(width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return wrapper.wrap(text)


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 110))


def config_page(prog: str, kind: type, values: Mapping[str, Any]) -> str:
    """Return all options as a YAML file that `--config` reads; those without a value or default are null.

    What a recipe sets is a comment, so that it follows from the recipe that the file has, and from what is changed.
    """
    import yaml

    recipe = recipe_of(kind)
    by_recipe = {} if recipe is None else {n: v for n, v in recipe.values(values).items() if n not in values}
    chosen = {**by_recipe, **values}
    lines = [f"# All options of {prog}. Use this file with --config FILE."]
    for section in _sections_shown(kind).values():
        lines += ["", *_wrapped(f"=== {title(section)}.", 100, "# ")]
        for each in section.options.values():
            lines += ["", *_wrapped(explanation(each), 100, "# ")]
            value = {each.name: chosen.get(each.name, None if each.required else each.default)}
            flow = None if isinstance(value[each.name], list) else False  # a list in one line
            line = yaml.safe_dump(value, allow_unicode=True, default_flow_style=flow, width=2**31).rstrip("\n")
            lines.append(f"# {line}" if each.name in by_recipe else line)
    return "\n".join([*lines, ""])


def options_table(kind: type) -> str:
    """Return the options of a command as Markdown tables, a table for each option class."""
    sections = _sections_shown(kind)
    positionals = getattr(kind, "positionals", ())
    training = "training" in sections
    lines: list[str] = []
    for section in sections.values():
        if len(sections) > 1:
            lines += [f"### {title(section)}", ""]
        head = ["Option", "Type", "Default", "Description"] + ["May change on resume"] * training
        lines += [_row(head), _row(["---"] * len(head))]
        for name, each in section.options.items():
            shown = f"`{each.metavar}` (`--{name}`)" if name in positionals else f"`--{name}`"
            cells = [shown, _type_text(each), default_text(each), each.help]
            lines.append(_row([*map(_escaped, cells), *[_RESUME[each.resume]] * training]))
        lines.append("")
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _type_text(option: Option) -> str:
    kind = ", ".join(f"`{each}`" for each in option.choices) or _TYPES[option.type]
    return f"list: {kind}" if option.is_list else kind
