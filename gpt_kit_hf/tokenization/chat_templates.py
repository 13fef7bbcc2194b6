r"""Chat templates with generation marks, for tokenizers whose only special token is EOS.

A template writes both the text that a model is trained on and the prompt for generation. The two agree token by token
if no token reaches over the place where the answer begins. So each header ends in a line end: with the patterns that
split text here (GPT-2's and ours) a pre-token never holds white space followed by something else, except one space
before a word. An answer that begins with white space is encoded apart from what stands before it, as it is generated.
"""

from __future__ import annotations

import hashlib
import re
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gpt_kit_hf.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A content is a text, or a list of parts of text, which line ends join.
_TEXT_OF = (
    "{% macro text_of(content) %}"
    "{% if content is string %}{{ content }}"
    "{% elif content is defined and content is sequence and content is not mapping %}"
    "{% for part in content %}{% if part['type'] != 'text' or part['text'] is not string %}"
    "{{ raise_exception('a content holds a part of type ' ~ part['type'] ~ '; only parts of type text can be read') }}"
    r"{% endif %}{{ part['text'] }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% else %}{{ raise_exception('the content of a message must be a text') }}{% endif %}{% endmacro %}"
)
_TOOLS = (
    r"{% if tools %}{{ '### Tools:\n' }}"
    r"{% for tool in tools %}{{ tool | tojson ~ '\n' }}{% endfor %}{{ '\n' }}{% endif %}"
)
# Thinking and tool calls have the tags that most models use.
_ANSWER = (
    "{% set thinking = message['reasoning_content'] or message['thinking'] or message['reasoning'] %}"
    r"{% if thinking %}{{ '<think>\n' ~ thinking ~ '\n</think>\n\n' }}{% endif %}"
    "{% if message['content'] or not message['tool_calls'] %}{{ text_of(message['content']) }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{% set function = call['function'] or call %}"
    r"{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    r"{{ '<tool_call>\n{\"name\": ' ~ function['name'] | tojson ~ ', \"arguments\": ' }}"
    "{% if function['arguments'] is string %}{{ function['arguments'] }}"
    "{% else %}{{ function['arguments'] | tojson }}{% endif %}"
    r"{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ eos_token }}"
)


def _template(system: str, user: str, assistant: str, opening: str = "") -> str:
    """Return a template with these headers; `opening` is Jinja source at the start of each message."""
    return (
        _TEXT_OF
        + _TOOLS
        + "{% for message in messages %}"
        + opening
        + "{% if message['role'] in ['system', 'developer'] %}"
        "{% if not loop.first %}{{ raise_exception('a system message must be the first') }}{% endif %}"
        "{{ " + system + r"text_of(message['content']) + '\n\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ " + f"'{user}" + r"\n' + text_of(message['content']) + '\n\n' }}"
        "{% elif message['role'] in ['tool', 'function'] %}"
        r"{{ '### Tool:\n' + text_of(message['content']) + '\n\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ " + f"'{assistant}" + r"\n' }}"
        "{% generation %}" + _ANSWER + "{% endgeneration %}"
        "{% else %}"
        "{{ raise_exception('unknown role ' + (message['role'] | string) + '; known: system, developer, user, tool, "
        "function, assistant') }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + f"'{assistant}" + r"\n' }}{% endif %}"
    )


DEFAULT_TEMPLATE = _template(r"'### System:\n' + ", "### User:", "### Assistant:")

# One user turn gives the prompt of `format_alpaca` for a row without input. A system message replaces the sentence
# before it.
ALPACA_TEMPLATE = _template(
    "",
    "### Instruction:",
    "### Response:",
    "{% if loop.first and message['role'] not in ['system', 'developer'] %}"
    "{{ 'Below is an instruction that describes a task. ' }}"
    r"{{ 'Write a response that appropriately completes the request.\n\n' }}"
    "{% endif %}",
)

CHAT_TEMPLATES = {"default": DEFAULT_TEMPLATE, "alpaca": ALPACA_TEMPLATE}
# SHA-256 of templates that earlier versions saved with models: they know fewer roles, and strip answers.
_EARLIER = {
    "016551723d338f5ea676c88039d2477f7e776227bbbb380c49c0ae84c7092698": "default",
    "4513dd90b7ac9cbac469de5cf56ff9e7c036e4ebfe142455fc0830b2e7a92c85": "alpaca",
}

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HOW_TO_FIX = (
    "write {% generation %} before and {% endgeneration %} after an assistant's content and EOS in "
    "tokenizer.chat_template, or set one of ours (get_chat_template('default'))"
)


def get_chat_template(name: str) -> str:
    """Return the Jinja source of the template "default" or "alpaca", for `tokenizer.chat_template`."""
    if name not in CHAT_TEMPLATES:
        raise UsageError(unknown_name("chat template", name, CHAT_TEMPLATES))
    return CHAT_TEMPLATES[name]


def template_name(template: object) -> str | None:
    """Return "default" or "alpaca" for the source of a template of this or an earlier version, None for another."""
    if not isinstance(template, str):
        return None
    known = next((name for name, source in CHAT_TEMPLATES.items() if source == template), None)
    return known or _EARLIER.get(hashlib.sha256(template.encode()).hexdigest())


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError unless the generation marks of the chat template enclose exactly each answer and one EOS."""
    template = tokenizer.chat_template
    if template is None:
        raise UsageError(
            "the tokenizer has no chat template; set tokenizer.chat_template = get_chat_template('default')"
        )
    sources = template.values() if isinstance(template, dict) else [template]
    if not any(_GENERATION_MARK.search(source) for source in sources):
        raise UsageError(f"the chat template has no generation marks, so no answer would be trained: {_HOW_TO_FIX}")
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        ids, trained = render_chat(tokenizer, probe)
    except TemplateError as error:
        raise UsageError(f"the chat template cannot write a question and an answer: {error}") from None
    spans = trained_spans(trained)
    if not spans:
        raise UsageError(f"the chat template marks no token of an answer: {_HOW_TO_FIX}")
    start, stop = spans[-1]
    if ids[stop - 1] != tokenizer.eos_token_id:
        raise UsageError(
            f"the chat template trains no EOS: the last token inside its generation marks is {ids[stop - 1]}, "
            f"not {tokenizer.eos_token!r} ({tokenizer.eos_token_id}): {_HOW_TO_FIX}"
        )
    text = tokenizer.decode(ids[start:stop], skip_special_tokens=True)
    if len(spans) != 1 or start == 0 or "question" in text or text.strip() != "answer":
        raise UsageError(f"the chat template marks {text!r} of the answer 'answer' as trained: {_HOW_TO_FIX}")


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Return a conversation's ids, and for each id 1 inside generation marks, 0 outside.

    Raises jinja2.TemplateError if the template rejects the messages.
    """
    return encode_rendered(tokenizer, *render_text(tokenizer, messages))


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    template: str | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text, and (start, stop) of the characters inside each pair of generation marks.

    `template` replaces the tokenizer's. Raises jinja2.TemplateError if the template rejects the messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.get_chat_template(template, tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation's text, and for each id 1 inside the spans of characters, 0 outside.

    The text is encoded as a whole, as `apply_chat_template` does. Where an answer begins with white space, a token
    could join it to the header before it: there the text is encoded in pieces, as it is generated, if the tokenizer
    can (one that begins each text with a space cannot).
    """
    ids, trained = _encode_piece(tokenizer, text, spans)
    cuts = [start for start, stop in spans if start < stop and text[start].isspace()]
    if not cuts:
        return ids, trained
    in_pieces: tuple[list[int], list[int]] = ([], [])
    for first, last in pairwise([0, *cuts, len(text)]):
        inside = [(start - first, stop - first) for start, stop in spans if first <= start < last]
        for whole, piece in zip(in_pieces, _encode_piece(tokenizer, text[first:last], inside), strict=True):
            whole.extend(piece)
    return in_pieces if tokenizer.decode(in_pieces[0]) == tokenizer.decode(ids) else (ids, trained)


def _encode_piece(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    # Not verbose: callers check the length themselves.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    ids = list(encoded["input_ids"])
    trained = [0] * len(ids)
    for start, stop in spans:
        first, last = encoded.char_to_token(start), encoded.char_to_token(stop - 1)
        if first is not None:
            end = len(ids) if last is None else last + 1
            trained[first:end] = [1] * (end - first)
    return ids, trained


def trained_spans(trained: Any) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of trained tokens."""
    spans, position = [], 0
    for flag, run in groupby(trained):
        length = sum(1 for _ in run)
        if flag:
            spans.append((position, position + length))
        position += length
    return spans
