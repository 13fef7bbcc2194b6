"""The declaration of an option: a dataclass field that holds its name, type, default, help, choices and bounds.

Everything that needs to know an option reads the declaration: the command line, validation, `--help`, the rules for
resuming a run, model cards and the table in the documentation.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from gpt_kit_hf.errors import UsageError, unknown_name

REQUIRED: Any = dataclasses.MISSING

# Whether the option may differ when a run is resumed: never, only if --allow_changes names it, only if --allow_changes
# names the text, or always.
Resume: TypeAlias = Literal["fixed", "allowed", "text", "free"]
# How a model card shows the value: as it is, as the last name of a path, as a Hub id or the last name of a path, as a
# list of weighted sources, or not at all.
Card: TypeAlias = Literal["value", "path", "path_or_id", "mixture", "hidden"]
# What the value names on the disk, so that it can be checked before any large library is imported.
Names: TypeAlias = Literal[
    "", "files", "weighted_files", "folder", "new_folder", "run", "model", "model_or_gguf", "model_or_weights"
]

_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option; see `option` for the fields. `default` is REQUIRED if there is none, `shown` is it in words."""

    name: str = ""
    type: type[int] | type[float] | type[bool] | type[str] = str
    is_list: bool = False
    optional: bool = False
    default: Any = dataclasses.field(default_factory=lambda: REQUIRED)
    help: str = ""
    choices: tuple[str, ...] = ()
    normalize: Callable[[str], str] | None = None
    noun: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    unset: str = ""
    shown: str = ""
    excludes: tuple[str, ...] = ()
    resume: Resume = "fixed"
    card: Card = "value"
    names: Names = ""
    metavar: str = ""

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is REQUIRED

    def check(self, value: Any) -> None:
        """Raise UsageError for a value of another type, an unknown choice or a number out of bounds."""
        if value is None and self.optional:
            return
        if self.is_list and not isinstance(value, (list, tuple)):
            raise UsageError(f"{self.name} must be a list, got {value!r}")
        for each in value if self.is_list else [value]:
            self._check_type(each)
            if self.choices and not self.allows(each):
                raise UsageError(unknown_name(self.noun or self.name, each, self.choices))
            if self.type in (int, float) and not self._within_bounds(each):
                raise UsageError(f"{self.name} must be {self._bounds()}, got {each}")

    def allows(self, value: str) -> bool:
        """Return whether a text is one of the choices."""
        return (self.normalize(value) if self.normalize else value) in self.choices

    def from_text(self, text: str) -> Any:
        """Return the value, or the element of a list, that a text means. Raises UsageError."""
        if self.optional and self.type is not str and text.lower() in ("none", "null"):
            return None
        try:
            return {"true": True, "false": False}[text.lower()] if self.type is bool else self.type(text)
        except (KeyError, ValueError):
            raise UsageError(f"{self.name} must be {_NOUNS[self.type]}, got {text!r}") from None

    def fits(self, value: object) -> bool:
        """Return whether a value of unknown origin is allowed for the option."""
        try:
            self.check(value)
        except UsageError:
            return False
        return True

    def _check_type(self, value: Any) -> None:
        right = isinstance(value, (int, float) if self.type is float else self.type)
        if not right or (isinstance(value, bool) and self.type is not bool):
            raise UsageError(f"{self.name} must be {_NOUNS[self.type]}, got {value!r}")

    def _within_bounds(self, value: float) -> bool:
        return (
            (self.type is int or math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _bounds(self) -> str:
        bounds = {"at least": self.minimum, "above": self.above, "at most": self.maximum, "below": self.below}
        rules = [f"{words} {_number(bound)}" for words, bound in bounds.items() if bound is not None]
        if self.type is float and self.maximum is None and self.below is None:
            rules.append("finite")
        return " and ".join(rules)


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    normalize: Callable[[str], str] | None = None,
    noun: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unset: str = "",
    excludes: tuple[str, ...] = (),
    resume: Resume = "fixed",
    card: Card | None = None,
    names: Names = "",
    metavar: str = "",
) -> Any:
    """Declare an option as a dataclass field. Its name and type are those of the field; a Literal type has choices.

    Args:
        default: the default, REQUIRED if there is none.
        help: what it is, in one line, without its default and choices.
        choices: the values that are allowed, if the type is not a Literal.
        normalize: makes a value that the user writes in another way one of the choices.
        noun: what a value is called in "unknown <noun> 'x'", by default the option's name.
        minimum: the lowest value of a number.
        maximum: the highest value; a float without an upper bound must be finite.
        above: a bound that the number must exceed.
        below: a bound that the number must not reach.
        unset: what None means, in words; needed where the default is None.
        excludes: options of the same class that cannot be given together with this one.
        resume: whether it may differ when a run is resumed.
        card: how a model card shows it; by default not at all if it is free on resume, else as it is.
        names: what it names on the disk.
        metavar: the placeholder of its value in `--help`.

    """
    given = {name: value for name, value in locals().items() if name != "default"}
    given["card"] = card or ("hidden" if resume == "free" else "value")
    metadata = {"option": Option(default=default, **given)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _number(bound: float) -> str:
    return "2**63" if bound == 2**63 else f"{bound:g}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every option class: checks each value against its declaration."""

    # Of the options whose declaration does not say whether they may differ when a run is resumed.
    resume_by_default: ClassVar[Resume] = "fixed"

    def __post_init__(self) -> None:
        declared = options_of(type(self))
        for name, each in declared.items():
            each.check(getattr(self, name))
        for name, each in declared.items():
            for other in each.excludes:
                one, two = getattr(self, name), getattr(self, other)
                if _given(one) and _given(two):
                    raise UsageError(f"{name}={one} and {other}={two}: give one of them")


def _given(value: object) -> bool:
    return value is not None and value is not False and value != []


def changed_values(options: Options) -> dict[str, Any]:
    """Return the values of an option class that are not the defaults."""
    values = {name: (getattr(options, name), each.default) for name, each in options_of(type(options)).items()}
    return {name: value for name, (value, default) in values.items() if value != default}


def options_of(kind: type[Options]) -> Mapping[str, Option]:
    """Return the declarations of an option class by name."""
    hints = get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        resolved = _resolved(hints[field.name])
        declared = field.metadata["option"]
        choices = declared.choices or resolved.pop("choices")
        resume = kind.resume_by_default if declared.resume == "fixed" else declared.resume
        given = {**resolved, "choices": choices, "resume": resume}
        found[field.name] = dataclasses.replace(declared, name=field.name, **given)
    return types.MappingProxyType(found)


def _resolved(hint: Any) -> dict[str, Any]:
    """Return type, is_list, optional and choices of an annotation such as `list[str] | None`."""
    members = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        members = [each for each in get_args(hint) if each is not type(None)]
        return {**_resolved(members[0]), "optional": True}
    if get_origin(hint) is list:
        return {**_resolved(get_args(hint)[0]), "is_list": True}
    if get_origin(hint) is Literal:
        return {"type": str, "choices": get_args(hint)}
    return {"type": hint, "choices": ()}


@dataclass(frozen=True, kw_only=True)
class Section:
    """An option class as part of a command, with the defaults that it has there."""

    kind: type[Options]
    options: Mapping[str, Option]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of a command's options that follow from others: `values` returns them for what was given.

    `option` names the recipe, among the options of the field `section`.
    """

    option: Option
    section: str
    values: Callable[[Mapping[str, Any]], dict[str, Any]]


def recipe_of(kind: type) -> Recipe | None:
    """Return the recipe of a command's options, if they have one as their attribute `recipe`."""
    found: Recipe | None = getattr(kind, "recipe", None)
    return found


def sections_of(kind: Any) -> Mapping[str, Section]:
    """Return the sections of a command's options by field name; one class without sections is that of ""."""
    if issubclass(kind, Options):
        return {"": Section(kind=kind, options=options_of(kind))}
    hints, sections = get_type_hints(kind), {}
    # All that is compared: not what the options were built of.
    for field in (field for field in dataclasses.fields(kind) if field.compare):
        section = hints[field.name]
        options = options_of(section)
        if field.default_factory not in (dataclasses.MISSING, section):
            chosen = field.default_factory()
            options = {n: dataclasses.replace(each, default=getattr(chosen, n)) for n, each in options.items()}
        sections[field.name] = Section(kind=section, options=options)
    return types.MappingProxyType(sections)


def flat_declarations(kind: type) -> dict[str, Option]:
    """Return the declarations of a command's options as "section.name": declaration."""
    return {f"{s}.{name}": each for s, section in sections_of(kind).items() for name, each in section.options.items()}
