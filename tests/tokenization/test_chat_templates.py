from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpt_kit_hf.data.instructions.formats import format_alpaca
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.tokenization.chat_templates import (
    CHAT_TEMPLATES,
    check_chat_template,
    get_chat_template,
    render_chat,
    template_name,
    trained_spans,
)
from gpt_kit_hf.tokenization.encodings import get_encoding, save_tokenizer, train_bpe

TEXTS = [
    "Hello",
    "  leading",
    "\n\nlines\n",
    "trailing \n ",
    "### User:\n",
    "'s",
    "...",
    "1234",
    "日本語 é̂",
    "\t\u3000x",
    "\x1cy\x85",
    "a\r\nb",
]


def exported(encoding: tiktoken.Encoding, folder: Path, template: str | None) -> PreTrainedTokenizerBase:
    save_tokenizer(encoding, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    # Runs of line ends and spaces, and marks before them, so that tokens that reach over a boundary are learned.
    return train_bpe(["### Assistant:\n\n\n  text: \n ### User:\n\n \n\t'' \n1234 ...\n" * 20, *TEXTS * 5], 400)


@pytest.fixture(params=["bytes", "bpe", "gpt2"])
def encoding(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    if request.param == "bytes":
        return get_encoding("bytes")
    return request.getfixturevalue("bpe" if request.param == "bpe" else "gpt2_encoding")


def conversations() -> list[list[dict[str, str]]]:
    draw = random.Random(5)
    found = []
    for first, answer in itertools.product(TEXTS, TEXTS):
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
        if draw.random() < 0.5:
            turns.insert(0, {"role": "system", "content": draw.choice(TEXTS)})
        for _ in range(draw.randrange(3)):
            turns.append({"role": draw.choice(["user", "assistant"]), "content": draw.choice(TEXTS)})
        found.append(turns)
    return found


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_prompt_is_a_prefix_of_the_conversation_at_every_answer(
    name: str, encoding: tiktoken.Encoding, tmp_path: Path
) -> None:
    tokenizer = exported(encoding, tmp_path, get_chat_template(name))
    check_chat_template(tokenizer)
    for messages in conversations():
        ids, trained = render_chat(tokenizer, messages)
        spans = iter(trained_spans(trained))
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(
                messages[:number], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            start, stop = next(spans)
            assert tokenizer.decode(ids[:start]) == tokenizer.decode(prompt)
            # An earlier answer that begins with white space is encoded apart from its header.
            earlier = [turn["content"][:1] for turn in messages[:number] if turn["role"] == "assistant"]
            assert ids[:start] == prompt or any(first.isspace() for first in earlier)
            # The answer is trained with one end, as it stands, and as it would be encoded alone.
            alone = tokenizer.encode(message["content"], add_special_tokens=False)
            assert ids[start:stop] == [*alone, tokenizer.eos_token_id]
        assert next(spans, None) is None


def test_the_alpaca_template_writes_the_prompt_of_the_alpaca_format(tmp_path: Path) -> None:
    tokenizer = exported(get_encoding("bytes"), tmp_path, get_chat_template("alpaca"))
    for text in TEXTS:
        turn = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert asked == format_alpaca({"instruction": text, "input": ""})
    twice = [*turn, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    asked = tokenizer.apply_chat_template(twice, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("### Response:\nA<|endoftext|>### Instruction:\nB\n\n### Response:\n")


def test_the_default_template_writes_headers(tmp_path: Path) -> None:
    tokenizer = exported(get_encoding("bytes"), tmp_path, get_chat_template("default"))
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "### System:\ns\n\n### User:\nu\n\n### Assistant:\na<|endoftext|>### User:\nu\n\n### Assistant:\n"
    )


def test_a_saved_template_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = exported(get_encoding("bytes"), tmp_path / "one", get_chat_template("default"))
    tokenizer.save_pretrained(tmp_path / "two")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert loaded.chat_template == get_chat_template("default")
    check_chat_template(loaded)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "bot", "content": "x"}], "unknown role bot"),
        ([{"role": "User", "content": "x"}], "unknown role User"),
        ([{"role": None, "content": "x"}], "unknown role"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "must be the first"),
        ([{"role": "user", "content": None}], "must be a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type image_url; only"),
        ([{"role": "user", "content": ["x"]}], "only parts of type text can be read"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "must be a text"),
        ([{"role": "assistant", "content": None}], "must be a text"),
        ([{"role": "user"}], "must be a text"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(
    name: str, messages: list[dict[str, Any]], reason: str, tmp_path: Path
) -> None:
    tokenizer = exported(get_encoding("bytes"), tmp_path, get_chat_template(name))
    with pytest.raises(TemplateError, match=reason):
        render_chat(tokenizer, messages)


ASSISTANT = "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"


def looped(user: str, assistant: str) -> str:
    branches = f"{{% if m['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
    return f"{{% for m in messages %}}{branches}{{% endfor %}}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        (looped("{{ m['content'] }}", "{{ m['content'] + eos_token }}"), "has no generation marks"),
        (looped("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"), "trains no EOS"),
        (
            looped("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"),
            "trains no EOS",
        ),
        (looped("{% generation %}{{ m['content'] }}{% endgeneration %}", "{{ eos_token }}"), "trains no EOS"),
        (looped(ASSISTANT, "{{ m['content'] }}"), "marks 'question' of the answer"),
        (looped(ASSISTANT, ASSISTANT), "as trained"),
        (looped("x", "{% generation %}{{ m['content'] + '!' + eos_token }}{% endgeneration %}"), "marks 'answer!'"),
        (looped("x", "x{% if false %}" + ASSISTANT + "{% endif %}"), "marks no token"),
        (looped("{{ raise_exception('never') }}", ASSISTANT), "cannot write a question and an answer: never"),
    ],
)
def test_a_template_that_does_not_tell_what_is_trained_is_refused(
    template: str | None, reason: str, tmp_path: Path
) -> None:
    tokenizer = exported(get_encoding("bytes"), tmp_path, template)
    with pytest.raises(UsageError, match=reason) as refused:
        check_chat_template(tokenizer)
    assert "\n" not in str(refused.value)
    if template is not None and "never" not in reason:
        assert "{% generation %} before and {% endgeneration %} after" in str(refused.value)


def test_templates_of_earlier_versions_are_known_by_name() -> None:
    assert [template_name(get_chat_template(name)) for name in CHAT_TEMPLATES] == [*CHAT_TEMPLATES]
    assert template_name(ASSISTANT) is template_name(None) is None
    # The default template as it was saved before it knew other roles than these three.
    earlier = (
        "{% for message in messages %}{% if message['content'] is not string %}"
        "{{ raise_exception('the content of a message must be a text') }}{% endif %}"
        "{% if message['role'] == 'system' %}"
        "{% if not loop.first %}{{ raise_exception('a system message must be the first') }}{% endif %}"
        r"{{ '### System:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'user' %}"
        r"{{ '### User:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
        r"{{ '### Assistant:\n' }}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
        "{% else %}{{ raise_exception('unknown role ' + (message['role'] | string) + "
        "'; known: system, user, assistant') }}{% endif %}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
    )
    assert template_name(earlier) == "default"


def test_the_template_takes_what_files_hold(tmp_path: Path) -> None:
    tokenizer = exported(get_encoding("bytes"), tmp_path, get_chat_template("default"))
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    written = tokenizer.apply_chat_template(
        [
            {"role": "developer", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, call], "reasoning_content": "hm"},
            {"role": "function", "content": "4"},
            {"role": "assistant", "content": "  four ", "tool_calls": None},
        ],
        tokenize=False,
    )
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert written == (
        f"### System:\nx\ny\n\n### Assistant:\n<think>\nhm\n</think>\n\n{called}\n{called}<|endoftext|>"
        "### Tool:\n4\n\n### Assistant:\n  four <|endoftext|>"
    )


def test_an_unknown_template_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'alpaca'"):
        get_chat_template("alpacca")
