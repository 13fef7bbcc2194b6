"""Formats of instruction rows: which one a row has, and its fields and text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from gpt_kit_hf.data.instructions.rows import (
    CONVERSATIONS,
    INPUTS,
    INSTRUCTIONS,
    OUTPUTS,
    SYSTEMS,
    RowError,
    chosen_hint,
    holds,
    keys_of,
    list_in,
    listed,
    shown,
    text_field,
)

Row = Mapping[str, Any]
FormatFn = Callable[[Row], "str | tuple[str, str]"]
Message = dict[str, Any]

# The keys that identify a format.
_FORMAT_KEYS = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion")}

_RESPONSE_HEADER = "### Response:"
# Replaces the output to find out where a format function writes it: no text of a row contains it, and neither
# stripping nor change of case alters it (characters of Unicode's private use area).
_PROBE = "\ue6a1\ue6a2\ue6a3"


def format_of(row: Row) -> str:
    """Return the format of a row by its keys: "alpaca", "chat", "prompt_completion" or "text".

    A row with all keys of exactly one format has that format, whatever single key of another it has too. The names of
    questions and answers in well-known data sets count as Alpaca's. Raises RowError for a row of several formats or of
    none.
    """
    filled = {key for key, value in row.items() if holds(value)}
    # A null, as in a table of rows of several formats, decides only if nothing else does.
    found = _formats_of(filled) or _formats_of(row.keys())
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise RowError(
            "several formats",
            f"the keys {', '.join(repr(key) for keys in found.values() for key in keys)} are of several formats; say "
            "which by format, or name the columns by columns, such as instruction=question,output=answer",
        )
    raise RowError(
        "unknown format",
        "the row has neither 'messages', nor 'prompt' and 'completion', nor 'instruction' and 'output', nor other "
        f"names that are known; name them by columns, such as instruction=question,output=answer; {keys_of(row)}"
        f"{chosen_hint(row)}",
    )


def _formats_of(keys: Collection[str]) -> dict[str, list[str]]:
    """Return the formats that keys may mean, and for each the keys that say so."""
    chat = [key for key in CONVERSATIONS if key in keys]
    complete = {name: [*needed] for name, needed in _FORMAT_KEYS.items() if all(key in keys for key in needed)}
    if len(chat) > 1:
        return complete | dict.fromkeys(chat, chat)
    if complete or chat:
        return complete | ({"chat": chat} if chat else {})
    questions, answers = ([key for key in names if key in keys] for names in (INSTRUCTIONS, OUTPUTS))
    if questions and answers:
        one = len(questions) == len(answers) == 1
        return {"alpaca": [*questions, *answers]} if one else {"alpaca": questions, "other": answers}
    # The reader of a format names the key that is missing.
    partial = {name: [key for key in needed if key in keys] for name, needed in _FORMAT_KEYS.items()}
    partial["text"] = ["text"] if "text" in keys else []
    return {name: found for name, found in partial.items() if found}


def alpaca_fields(row: Row) -> tuple[dict[str, Any], set[str]]:
    """Return the fields of an Alpaca row under Alpaca's names, and the keys that were read; raises RowError.

    input, system and history are "" or [] if the row has none. The row may have the names of well-known data sets.
    """
    keys: dict[str, str] = {}
    own = holds(row.get("instruction")) and holds(row.get("output"))
    for field, names in (("instruction", INSTRUCTIONS), ("output", OUTPUTS)):
        filled = [name for name in names if holds(row.get(name))]
        if len(filled) > 1 and not own:
            raise RowError("several formats", f"the keys {listed(filled)} may be the {field}; say which by columns")
        if filled or field in row:
            keys[field] = field if field in filled or not filled else filled[0]
    if missing := [field for field in ("instruction", "output") if field not in keys]:
        hint = f"if another column holds it, give --columns {missing[0]}=COLUMN"
        raise RowError("missing key", f"{listed(missing, 'is', 'are')} missing; {keys_of(row)}; {hint}")
    found: dict[str, Any] = {field: text_field(row, key) for field, key in keys.items()}
    for field, other_names in (("input", INPUTS), ("system", SYSTEMS)):
        keys[field] = next((name for name in other_names if holds(row.get(name))), field)
        found[field] = text_field(row, keys[field], blank=True) if holds(row.get(keys[field])) else ""
    found["history"] = list_in(row.get("history")) or []
    return found, {*keys.values(), "history"}


def as_messages(fields: Mapping[str, Any], *, headed_input: bool) -> list[Message]:
    """Return the fields of an Alpaca row as messages: the system text, the history as turns, question and answer.

    `headed_input` writes Alpaca's header before an input. Raises RowError.
    """
    messages = [{"role": "system", "content": fields["system"]}] if fields["system"].strip() else []
    if not isinstance(fields["history"], list):
        raise RowError("wrong type", f"'history' is {shown(fields['history'])}; it must be a list of pairs")
    for number, pair in enumerate(fields["history"]):
        if not isinstance(pair, list | tuple) or [*map(type, pair)] != [str, str]:
            raise RowError(
                "wrong type", f"history[{number}] is {shown(pair)}; it must be [question, answer], two strings"
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question, context = text_field(fields, "instruction"), fields["input"]
    if context.strip():
        question += f"\n\n### Input:\n{context}" if headed_input else f"\n\n{context}"
    answer = text_field(fields, "output")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def format_alpaca(entry: Row) -> str:
    r"""Return the Alpaca prompt of a row, up to and including "### Response:\n", without the answer.

    The section "### Input:" is written if the row's input is not blank. The row needs the key instruction only, so it
    also gives the prompt for generation.

    Source: the prompt of Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca.

    Raises:
        DataError: the instruction is missing or blank, or a field is not a string.

    """
    instruction = text_field(entry, "instruction")
    context = text_field(entry, "input", blank=True) if entry.get("input") is not None else ""
    task, section = "describes a task.", ""
    if context.strip():
        task = "describes a task, paired with an input that provides further context."
        section = f"### Input:\n{context}\n\n"
    return (
        f"Below is an instruction that {task} Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{section}{_RESPONSE_HEADER}\n"
    )


def prompt_completion_fields(row: Row) -> tuple[dict[str, Any], set[str]]:
    """Return the fields of a row of prompt and completion under Alpaca's names, and the keys that were read."""
    if missing := [name for name in ("prompt", "completion") if name not in row]:
        raise RowError("missing key", f"{listed(missing, 'is', 'are')} missing; {keys_of(row)}{chosen_hint(row)}")
    key = next((name for name in SYSTEMS if holds(row.get(name))), "system")
    fields = {"instruction": text_field(row, "prompt"), "output": text_field(row, "completion")}
    system = text_field(row, key, blank=True) if holds(row.get(key)) else ""
    return {**fields, "input": "", "system": system, "history": []}, {"prompt", "completion", key}


def format_prompt_completion(row: Row) -> tuple[str, str]:
    """Return the prompt and the completion of a row; raises RowError."""
    fields, _ = prompt_completion_fields(row)
    if fields["system"].strip():
        raise RowError(
            "system", "a system text has no place before a prompt that is used as it is; set chat_template to default"
        )
    return fields["instruction"], fields["output"]


def prompt_and_answer(entry: Row, format_fn: FormatFn = format_alpaca) -> tuple[str, str]:
    r"""Return a row's prompt and answer as ``format_fn`` writes them; joined they are the training text.

    ``format_fn(entry)`` returns one of three things. Which one is found by calling it, not by looking at the text:

    - a tuple (prompt, answer), used as it is;
    - the whole text. The function is called again with another output: the text before the place that changes is
      the prompt, everything from there on is the answer;
    - a prompt alone, which does not change with the output. The answer is the row's output, after
      "\n\n### Response:\n" if the prompt does not end in that header, and on a new line if it does.

    Raises:
        DataError: one of the fields instruction, input and output is present and not a string (a number, NaN, or None
            for another field than input);
            the function asks for a key that the row lacks; the output is missing, blank, or written twice; the text
            changes elsewhere than at the output; the prompt is empty.

    """
    for name in ("instruction", "input", "output"):
        if name in entry and (name != "input" or entry[name] is not None):
            text_field(entry, name, blank=True)
    formatted = _formatted(entry, format_fn)
    prompt, answer = formatted if isinstance(formatted, tuple) else _split(formatted, entry, format_fn)
    if not prompt:
        raise RowError("format", "the prompt is empty")
    if not answer.strip():
        raise RowError("format", "the answer is blank, and would train nothing")
    return prompt, answer


def _formatted(entry: Row, format_fn: FormatFn) -> str | tuple[str, str]:
    try:
        formatted = format_fn(entry)
    except RowError:
        raise
    except KeyError as error:
        raise RowError("format", f"format_fn asks for {error}, which the row lacks") from error
    except Exception as error:
        # The function is the user's and may not expect such a row; the cause keeps its traceback.
        raise RowError("format", f"format_fn raised {type(error).__name__}: {shown(str(error))}") from error
    if isinstance(formatted, str) or (isinstance(formatted, tuple) and [*map(type, formatted)] == [str, str]):
        return formatted
    raise RowError("format", f"format_fn returned {formatted!r}; it must be a string, or two: (prompt, answer)")


def _split(text: str, entry: Row, format_fn: FormatFn) -> tuple[str, str]:
    """Return the prompt and the answer of a text of ``entry``, or add the answer if the text is a prompt alone."""
    output = text_field(entry, "output")
    try:
        probe = format_fn({**entry, "output": _PROBE})
    except Exception as error:
        reason = "format_fn fails if only the output changes, so the answer cannot be told from the prompt"
        raise RowError("format", f"{reason}; return (prompt, answer)") from error
    if probe == text:  # the output is not in it
        head = text.rstrip()
        prompt = head if head.endswith(_RESPONSE_HEADER) else f"{text}\n\n{_RESPONSE_HEADER}"
        return f"{prompt}\n", output
    pieces = probe.split(_PROBE) if isinstance(probe, str) else []
    if len(pieces) != 2:
        reason = f"format_fn writes the output {max(len(pieces) - 1, 0)} times, or another text at each call"
        raise RowError("format", f"{reason}; write it once, or return (prompt, answer)")
    prompt, tail = pieces
    if len(text) <= len(prompt) + len(tail) or not (text.startswith(prompt) and text.endswith(tail)):
        raise RowError("format", "format_fn changes more than the answer with the output; return (prompt, answer)")
    return prompt, text[len(prompt) :]
