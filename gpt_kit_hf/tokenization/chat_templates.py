r"""Chat templates with generation marks, for tokenizers whose only special token is the end of text.

A template writes the text that a model is trained on and the prompt that it is asked with. The two agree token by
token where a token cannot reach over the place at which the answer begins. So each header ends in a line end, and an
answer's outer white space is left out: by the patterns that cut a text before it is encoded (GPT-2's and ours) a piece
never holds white space and then something else, but for one plain space before a word.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gpt_kit_hf.errors import UsageError, unknown_name

_TRAINED_ANSWER = "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
_REFUSE_ROLE = (
    "{{ raise_exception('unknown role ' + (message['role'] | string) + '; known: system, user, assistant') }}"
)
_REFUSE_SYSTEM = "{{ raise_exception('a system message must be the first') }}"
_NO_TEXT = "{{ raise_exception('the content of a message must be a text') }}"
_REFUSE_CONTENT = "{% if message['content'] is not string %}" + _NO_TEXT + "{% endif %}"

# "### User:" and the text; after "### Assistant:" the answer, which the end of text ends.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    f"{_REFUSE_CONTENT}"
    "{% if message['role'] == 'system' %}"
    "{% if not loop.first %}" + _REFUSE_SYSTEM + "{% endif %}"
    r"{{ '### System:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    r"{{ '### User:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    r"{{ '### Assistant:\n' }}" + _TRAINED_ANSWER + "{% else %}" + _REFUSE_ROLE + "{% endif %}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)

# One turn of the user gives the prompt of `format_alpaca` for a row without input. A system message takes the place of
# the sentence before it.
ALPACA_TEMPLATE = (
    "{% for message in messages %}"
    f"{_REFUSE_CONTENT}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ 'Below is an instruction that describes a task. ' }}"
    r"{{ 'Write a response that appropriately completes the request.\n\n' }}"
    "{% endif %}"
    "{% if message['role'] == 'system' %}"
    "{% if not loop.first %}" + _REFUSE_SYSTEM + "{% endif %}"
    r"{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    r"{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    r"{{ '### Response:\n' }}" + _TRAINED_ANSWER + "{% else %}" + _REFUSE_ROLE + "{% endif %}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

CHAT_TEMPLATES = {"default": DEFAULT_TEMPLATE, "alpaca": ALPACA_TEMPLATE}

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HOW_TO_FIX = (
    "write {% generation %} before and {% endgeneration %} after an assistant's content and the end of text in "
    "tokenizer.chat_template, or set one of ours (get_chat_template('default'))"
)


def get_chat_template(name: str) -> str:
    """Return the Jinja source of a template of this package, "default" or "alpaca", for `tokenizer.chat_template`."""
    if name not in CHAT_TEMPLATES:
        raise UsageError(unknown_name("chat template", name, CHAT_TEMPLATES))
    return CHAT_TEMPLATES[name]


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError, which says how to fix it, unless the template tells what is trained.

    An assistant's answer and one end of text after it, and nothing before it, must lie in generation marks.
    """
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
            f"the chat template trains no end of text: the last token inside its generation marks is {ids[stop - 1]}, "
            f"not {tokenizer.eos_token!r} ({tokenizer.eos_token_id}): {_HOW_TO_FIX}"
        )
    text = tokenizer.decode(ids[start:stop], skip_special_tokens=True)
    if len(spans) != 1 or start == 0 or "question" in text or text.strip() != "answer":
        raise UsageError(f"the chat template marks {text!r} of the answer 'answer' as trained: {_HOW_TO_FIX}")


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Return a conversation's ids, and 1 for each id inside generation marks, 0 elsewhere.

    Raises jinja2.TemplateError where the template refuses the messages.
    """
    # Not verbose: the row's length is checked, and said, by who asks.
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
