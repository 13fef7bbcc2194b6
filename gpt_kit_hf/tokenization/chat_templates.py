r"""Chat templates with generation marks, for tokenizers whose only special token is EOS.

A template writes both the text that a model is trained on and the prompt for generation. The two agree token by token
if no token reaches over the place where the answer begins. So each header ends in a line end, and an answer is written
without its outer white space: with the patterns that split text here (GPT-2's and ours) a pre-token never holds white
space followed by something else, except one space before a word.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gpt_kit_hf.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _template(system: str, user: str, assistant: str, opening: str = "") -> str:
    """Return a template with these headers; `opening` is Jinja source at the start of each message."""
    return (
        "{% for message in messages %}"
        "{% if message['content'] is not string %}"
        "{{ raise_exception('the content of a message must be a text') }}"
        "{% endif %}" + opening + "{% if message['role'] == 'system' %}"
        "{% if not loop.first %}{{ raise_exception('a system message must be the first') }}{% endif %}"
        "{{ " + system + r"message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ " + f"'{user}" + r"\n' + message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ " + f"'{assistant}" + r"\n' }}"
        "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
        "{% else %}"
        "{{ raise_exception('unknown role ' + (message['role'] | string) + '; known: system, user, assistant') }}"
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
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ 'Below is an instruction that describes a task. ' }}"
    r"{{ 'Write a response that appropriately completes the request.\n\n' }}"
    "{% endif %}",
)

CHAT_TEMPLATES = {"default": DEFAULT_TEMPLATE, "alpaca": ALPACA_TEMPLATE}

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
    # Not verbose: callers check the length themselves.
    rendered = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return list(rendered["input_ids"]), list(rendered["assistant_masks"])


def trained_spans(trained: Any) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of trained tokens."""
    spans, position = [], 0
    for flag, run in groupby(trained):
        length = sum(1 for _ in run)
        if flag:
            spans.append((position, position + length))
        position += length
    return spans
