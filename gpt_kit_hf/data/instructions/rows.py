"""An instruction row: its place, its faults, and the names that its fields may have."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from gpt_kit_hf.errors import DataError
from gpt_kit_hf.tokenization.encodings import check_text

# The names of a field: first that of the format, then those of well-known data sets.
INSTRUCTIONS = ("instruction", "question", "query", "prompt", "problem")
OUTPUTS = ("output", "response", "answer", "completion", "solution")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
CONVERSATIONS = ("messages", "conversations", "conversation")
_NAMES = {
    "instruction": INSTRUCTIONS,
    "output": OUTPUTS,
    "input": INPUTS,
    "system": SYSTEMS,
    "messages": CONVERSATIONS,
}
FIELD_NAMES = frozenset(name for names in _NAMES.values() for name in names) | {"history", "text"}
# Thinking that is written into the text of an answer; its opening may have been a part of the prompt.
_THINKING = re.compile(r"\s*<(think|thinking)>")
_THINKING_ENDS = re.compile(r"</(think|thinking)>[ \t]*\r?\n\s*")
# Marks of whole rows: KTO's (TRL and LLaMA-Factory), whose bad answers are there to be avoided, and weights.
_ROW_MARKS = ("label", "kto_tag", "train", "weight")
# A row may have none of these.
_OPTIONAL = ("input", "system", "history")


class PlacedRow(NamedTuple):
    """A row and its place: file:line where it begins for text files, "name row 5", counted from 0, for tables."""

    place: str
    row: dict[str, Any]


class BadRow(NamedTuple):
    """A row that is left out: its place, the kind of fault, by which rows are counted, and the reason."""

    place: str
    kind: str
    reason: str


class RowError(DataError):
    """A fault of one row, with its kind; the message names no place, the caller adds it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def with_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with the values of `columns`, {field: column}, under the names of the fields.

    What else could be read as one of these fields is set aside. Raises RowError if a column is missing.
    """
    missing = [column for field, column in columns.items() if column not in row and field not in _OPTIONAL]
    if missing:
        raise RowError("missing key", f"columns: {listed(missing, 'is', 'are')} missing; {keys_of(row)}")
    found = {field: row[column] for field, column in columns.items() if column in row}
    others = {name for field in columns for name in _NAMES.get(field, (field,))}
    for key, value in row.items():
        if key not in columns.values():
            found[set_aside(key) if key in others else key] = value
    return found


def set_aside(key: str) -> str:
    """Return the key under which a value stays in a row that must not be read as the field of that name."""
    return f"{key} (not mapped)"


def holds(value: object) -> bool:
    """Return whether a value says anything: it is not null, and no empty list or object."""
    return value is not None and value != [] and value != {}


def listed(names: list[str], one: str = "", many: str = "") -> str:
    """Return names in quotes with the verb that fits: "'a' is", "'a' and 'b' are"."""
    quoted = [repr(name) for name in names]
    text = " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
    return f"{text} {one if len(names) == 1 else many}".rstrip()


def keys_of(row: Mapping[str, Any]) -> str:
    """Return the keys of a row or turn, for a message; those of an object in it after its key, in brackets."""
    keys = (
        f"{key} ({', '.join(map(str, value))})" if isinstance(value, Mapping) else str(key)
        for key, value in row.items()
    )
    return f"its keys: {shown(', '.join(keys), 200) if row else 'none'}"


def text_field(row: Mapping[str, Any], name: str, *, blank: bool = False) -> str:
    """Return a string of the row; raises RowError if it is missing, not a string, or blank and must not be."""
    value = required_field(row, name)
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name!r} is {shown(value)} ({type(value).__name__}); it must be a string")
    if not blank and not value.strip():
        raise RowError("blank", f"{name!r} is blank")
    return value


def required_field(row: Mapping[str, Any], name: str) -> Any:
    """Return a value of the row; raises RowError if it is missing, null or NaN."""
    if name not in row:
        raise RowError("missing key", f"{name!r} is missing; {keys_of(row)}")
    value = row[name]
    if value is None:
        raise RowError("null", f"{name!r} is null; it must have a value")
    if isinstance(value, float) and value != value:
        raise RowError("NaN or infinity", f"{name!r} is NaN; it must be a string")
    return value


def list_in(value: Any) -> Any:
    """Return the list that a string of JSON holds, as in the cell of a table; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def without_thinking(answer: str) -> str:
    """Return an answer without the thinking that it begins with; raises RowError if that does not end."""
    if not (opened := _THINKING.match(answer)):
        ends = _THINKING_ENDS.search(answer)
        return answer[ends.end() :] if ends and f"<{ends[1]}>" not in answer[: ends.start()] else answer
    if not (closed := re.compile(rf"</{opened[1]}>\s*").search(answer, opened.end())):
        raise RowError(
            "thinking",
            f"the answer begins with <{opened[1]}>, which is not closed: close it, or give --thinking train, which "
            "trains it as it stands",
        )
    return answer[closed.end() :]


def row_marks(row: Mapping[str, Any]) -> set[str]:
    """Return the marks by which a row says that its answer is to be trained; raises RowError if it is not to be."""
    marks = {key: str(row[key]).lower() for key in _ROW_MARKS if key in row}
    # A number under KTO's keys is the number of a class.
    no, yes = (
        [key for key, mark in marks.items() if mark == word or (mark in numbers and key in ("train", "weight"))]
        for word, numbers in (("false", ("0", "0.0")), ("true", ("1", "1.0")))
    )
    if no:
        raise RowError(
            "not to be trained",
            f"{no[0]!r} is {shown(row[no[0]])}: the answer of this row is not to be trained; leave such rows "
            "out by on_bad_row skip, or rename the key if it means something else",
        )
    return set(yes)


def chosen_hint(row: Mapping[str, Any]) -> str:
    """Return how to train the better answer of a pair, for a message; "" for other rows."""
    chosen, prompt = row.get("chosen"), row.get("prompt")
    if not isinstance(chosen, str | list) or (isinstance(chosen, str) and prompt is None):
        return ""
    field = "messages" if isinstance(chosen, list) and not isinstance(prompt, list) else "completion"
    return f"; to train the answers that were chosen, give --columns {field}=chosen"


def check_is_object(row: Any) -> None:
    """Raise RowError unless the row is a dict."""
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"a row is a dict, got {shown(row)}")


def check_row_text(text: str, name: str) -> None:
    """Raise RowError for a lone surrogate, which Python's JSON accepts and no tokenizer can encode."""
    try:
        check_text(text, f"the {name}")
    except DataError as error:
        raise RowError("lone surrogate", str(error)) from None


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def shown(value: Any, width: int = 60) -> str:
    """Return a value on one line of at most `width` characters, for a message."""
    if isinstance(value, str):
        value = value[: width + 1]  # before repr, which is slow for 10 MB
    written = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return written if len(written) <= width else written[: width - 3] + "..."
