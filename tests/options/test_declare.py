"""Every declared option: its bounds and choices hold, and it explains itself."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

import pytest

from gpt_kit_hf.commands.main import COMMANDS
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.declare import REQUIRED, Option, Options, option, options_of, sections_of
from gpt_kit_hf.options.pages import default_text

DECLARED = {
    f"{section.kind.__name__}.{name}": each
    for command in COMMANDS.values()
    for section in sections_of(command.options).values()
    for name, each in section.options.items()
}


@pytest.mark.parametrize("name", DECLARED)
def test_every_option_refuses_what_is_out_of_its_bounds_and_choices(name: str) -> None:
    declared = DECLARED[name]
    wrong: list[Any] = [object()]
    if declared.type is int:
        wrong += [1.5, "1", True]
    if declared.type is float:
        wrong += [math.nan, "1", False]
    if declared.type is float and declared.maximum is None and declared.below is None:
        wrong.append(math.inf)
    if declared.type is bool:
        wrong += [1, "true"]
    if declared.choices:
        wrong += ["no such choice", ""]
    small = 1 if declared.type is int else 1e-9
    wrong += [] if declared.minimum is None else [declared.minimum - small]
    wrong += [] if declared.maximum is None else [declared.maximum + small]
    wrong += [each for each in (declared.above, declared.below) if each is not None]
    for value in wrong:
        with pytest.raises(UsageError, match=rf"^({declared.name} must be |unknown .*; (did you mean|known))"):
            declared.check([value] if declared.is_list else value)
    if not declared.required:
        declared.check(declared.default)
    for choice in declared.choices:
        declared.check([choice] if declared.is_list else choice)
    for bound in (declared.minimum, declared.maximum):
        if bound is not None:
            declared.check(declared.type(bound))


@pytest.mark.parametrize("name", DECLARED)
def test_every_option_explains_itself(name: str) -> None:
    declared = DECLARED[name]
    assert declared.help
    assert "default" not in declared.help.replace("the dataset's default", "")  # the declaration itself says it
    assert ", if not" not in declared.help
    assert not declared.help.endswith(".")
    assert re.fullmatch(r"[a-z0-9_]+", declared.name)
    assert default_text(declared)
    if declared.default is None:
        assert declared.optional
        assert declared.unset
    assert set(declared.excludes) <= {each.name for each in DECLARED.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Painting(Options):
    """A painting."""

    title: str = option(REQUIRED, "what it is called")
    color: Literal["red", "green"] = option("red", "its color")
    width: float = option(1.0, "its width in meters", above=0, maximum=10, unset="")
    layers: int | None = option(None, "coats of paint", minimum=1, unset="as many as needed", excludes=("tags",))
    tags: list[str] = option([], "words")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"color": "gren"}, "unknown color 'gren'; did you mean 'green' or 'red'?"),
        ({"width": 0.0}, "width must be above 0 and at most 10, got 0.0"),
        ({"width": math.nan}, "width must be above 0 and at most 10, got nan"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"layers": True}, "layers must be an integer, got True"),
        ({"title": 3}, "title must be text, got 3"),
        ({"tags": "one"}, "tags must be a list, got 'one'"),
        ({"tags": ["one"], "layers": 2}, "layers=2 and tags=['one']: give one of them"),
    ],
)
def test_a_wrong_value_names_the_option_the_rule_and_the_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        Painting(**{"title": "x", **values})


def test_a_declaration_knows_its_name_type_and_default() -> None:
    declared = options_of(Painting)
    assert list(declared) == ["title", "color", "width", "layers", "tags"]
    assert declared["title"].required
    assert declared["color"].choices == ("red", "green")
    assert (declared["layers"].type, declared["layers"].optional) == (int, True)
    assert (declared["tags"].type, declared["tags"].is_list, declared["tags"].default) == (str, True, [])
    one, two = Painting(title="a"), Painting(title="b")
    assert one.tags is not two.tags


def test_a_stranger_s_value_is_judged_without_an_exception() -> None:
    declared = Option(name="x", type=int, minimum=1)
    assert declared.fits(1)
    assert not any(map(declared.fits, (0, "1", None, [1], 1.0)))
