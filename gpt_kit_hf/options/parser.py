"""The command-line parser of every command: options from a YAML file and the command line, which wins."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gpt_kit_hf.errors import UsageError, one_line, unknown_name
from gpt_kit_hf.options.declare import Option, Section, recipe_of, sections_of
from gpt_kit_hf.options.pages import config_page, help_page, placeholder

T = TypeVar("T")

_HELP = Option(name="help", type=bool, default=False, help="show this help and exit")
_CONFIG = Option(
    name="config",
    optional=True,
    default=None,
    help="YAML file of options; options on the command line take precedence",
    unset="none",
    metavar="FILE",
)
_PRINT_CONFIG = Option(
    name="print_config", type=bool, default=False, help="print all options as a YAML file for --config, and exit"
)


def parse_options(kind: type[T], arguments: Sequence[str], *, prog: str, about: str = "") -> T:
    """Return the options of a command that the arguments ask for.

    `kind` is an option class, or a dataclass of them; its `positionals` are the names of the options that may be
    given without a name, its `recipe` gives defaults. Prints and exits for --help and --print_config.

    Raises UsageError for an unknown option, with the nearest known one, a wrong value, and an option that is missing.
    """
    sections, recipe = sections_of(kind), recipe_of(kind)
    known = {name: each for section in sections.values() for name, each in section.options.items()}
    if recipe is not None:
        known[recipe.option.name] = recipe.option
    general = {each.name: each for each in (_HELP, _CONFIG, _PRINT_CONFIG)}
    positionals: tuple[str, ...] = getattr(kind, "positionals", ())
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_page(prog, about, kind, general.values()))
        raise SystemExit(0)
    given = _from_command_line(arguments, {**known, **general}, positionals)
    values = dict(given)
    if "config" in given:
        from_file = _read_config(given["config"], known)
        values = {**{n: v for n, v in from_file.items() if n not in _replaced(known, given)}, **given}
    if not values.keys() - {"print_config", "recipe"} and values.get("print_config"):
        # Nothing else is asked for: the defaults, to fill in what is required.
        sys.stdout.write(config_page(prog, kind, values))
        raise SystemExit(0)
    options = _build(kind, sections, values, positionals)
    if (check := getattr(kind, "check_given", None)) is not None:
        check(given, values)
    if values.get("print_config"):
        sys.stdout.write(config_page(prog, kind, values))
        raise SystemExit(0)
    return options


def build_options(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the options of a command with these values, by name, also of a recipe; others have their defaults."""
    return _build(kind, sections_of(kind), values, ())


def _from_command_line(
    arguments: Sequence[str], known: Mapping[str, Option], positionals: Sequence[str]
) -> dict[str, Any]:
    """Return {option: value} of the arguments; of an option given twice the last value counts."""
    given: dict[str, Any] = {}
    without_name: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            without_name += rest
            break
        if not argument.startswith("--"):
            without_name.append(argument)
            continue
        written, _, inline = argument.removeprefix("--").partition("=")
        name = written.replace("-", "_")
        option, negated = known.get(name), known.get(name.removeprefix("no_"))
        if option is None and negated is not None and negated.type is bool and "=" not in argument:
            given[negated.name] = False
            continue
        if option is None:
            raise UsageError(_unknown_option(name, known))
        if "=" in argument:
            values = [inline]
        elif option.type is bool:
            values = [rest.pop(0)] if rest and rest[0].lower() in ("true", "false") else ["true"]
        else:
            values = _values(rest, many=option.is_list)
            if not values:
                hint = f" (write --{name}={rest[0]} if {rest[0]} is the value)" if _is_no_option(rest, known) else ""
                raise UsageError(f"{name} needs a value: --{name} {placeholder(option)}{hint}")
        converted = [option.from_text(value) for value in values]
        given[name] = converted if option.is_list else converted[0]
    named = _named(without_name, known, positionals)
    for name in named.keys() & given.keys():
        raise UsageError(f"{name} is given twice: as {named[name]!r} and by --{name}")
    return {**given, **named}


def _values(rest: list[str], *, many: bool) -> list[str]:
    """Take the value of an option, or all of its values, from the front of the arguments."""
    taken: list[str] = []
    while rest and not rest[0].startswith("--") and (many or not taken):
        taken.append(rest.pop(0))
    return taken


def _is_no_option(rest: Sequence[str], known: Iterable[str]) -> bool:
    written = rest[0].removeprefix("--").partition("=")[0].replace("-", "_") if rest else ""
    return bool(written) and not {written, written.removeprefix("no_")} & set(known)


def _named(values: list[str], known: Mapping[str, Option], positionals: Sequence[str]) -> dict[str, Any]:
    """Return the values that were given without a name, by name."""
    found: dict[str, Any] = {}
    rest = list(values)
    for name in positionals:
        if rest:
            found[name] = rest if known[name].is_list else known[name].from_text(rest.pop(0))
            rest = [] if known[name].is_list else rest
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}: options are given as --name value")
    return found


def _replaced(known: Mapping[str, Option], given: Mapping[str, Any]) -> set[str]:
    """Return the options of which the command line gives an alternative, which then wins over the file."""
    pairs = [(name, other) for name, each in known.items() for other in each.excludes]
    return {b for one, two in pairs for a, b in ((one, two), (two, one)) if a in given and b not in given}


def _build(kind: type[T], sections: Mapping[str, Section], values: Mapping[str, Any], positionals: Sequence[str]) -> T:
    built, recipe = {}, recipe_of(kind)
    given = values
    if recipe is not None:
        if recipe.option.name in given:
            recipe.option.check(given[recipe.option.name])
        values = {**recipe.values(given), **given}
    for field, section in sections.items():
        chosen = {name: values.get(name, each.default) for name, each in section.options.items()}
        for name, each in section.options.items():
            if each.required and name not in values:
                how = each.metavar if name in positionals else f"--{name} {placeholder(each)}"
                raise UsageError(f"{name} is missing: give {how}")
        built[field] = section.kind(**chosen)
    if "" in built:
        return built[""]  # type: ignore[return-value]
    options = kind(**built)
    if hasattr(options, "given"):
        options.given.update(given)
    return options


# --- a YAML file of options


def _read_config(file: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """Return {option: value} of a YAML file."""
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:  # noqa: PTH123 (as the user wrote it)
            content = yaml.load(stream, _loader())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {file!r} cannot be read: {one_line(error)}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # the last three: !!int x, !!bool x
        raise UsageError(f"config {file!r} is not YAML: {one_line(error)}") from None
    except RecursionError:
        raise UsageError(f"config {file!r} is not YAML: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise UsageError(f"config {file!r} must hold 'name: value' lines")
    values = {}
    for written, value in content.items():
        name = str(written).replace("-", "_")
        if name not in known:
            raise UsageError(f"config {file!r}: {_unknown_option(name, known)}")
        if value is not None or known[name].optional:
            values[name] = _from_yaml(known[name], value)
    return values


def _loader() -> Any:
    """Return a safe loader that leaves all values but null as they are written; the option decides what they mean.

    YAML 1.1 reads `mixed_precision: no` as false, `replay: 1:50` as 110, `prompt: 007` as 7 and 1e-4 as text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
            first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return Loader


def _from_yaml(option: Option, value: Any) -> Any:
    if value is None:
        return None
    if option.is_list:
        return [_scalar(option, each) for each in (value if isinstance(value, list) else [value])]
    return _scalar(option, value)


def _scalar(option: Option, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if option.type is bool:  # as YAML 1.1 has it
        value = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower(), value)
    return option.from_text(value)


def _unknown_option(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown option: with the nearest names, if there are any."""
    message = unknown_name("option", name, known)
    return message if "did you mean" in message else f"unknown option {name!r}; --help lists the options"
