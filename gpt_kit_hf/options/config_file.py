"""A YAML file of options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gpt_kit_hf.errors import UsageError, one_line, unknown_name
from gpt_kit_hf.options.declare import Option


def read_config(file: str, known: Mapping[str, Option]) -> dict[str, Any]:
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
            raise UsageError(f"config {file!r}: {unknown_option(name, known)}")
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


def unknown_option(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown option: with the nearest names, if there are any."""
    message = unknown_name("option", name, known)
    return message if "did you mean" in message else f"unknown option {name!r}; --help lists the options"
