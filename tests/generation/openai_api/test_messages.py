"""The prompt of a chat over the server is what the package's own chat template writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import byte_tokenizer

from gpt_kit_hf import get_chat_template
from gpt_kit_hf.generation.openai_api.messages import render_prompt
from gpt_kit_hf.generation.openai_api.protocol import ChatRequest

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
    {"role": "user", "content": "  1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "2 is two"},
    {"role": "function", "content": "3"},
]


@pytest.mark.parametrize("name", ["default", "alpaca"])
def test_messages_are_written_as_the_template_writes_them(name: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    tokenizer.chat_template = get_chat_template(name)
    asked = ChatRequest.model_validate({"messages": MESSAGES})
    as_files_have_them = [
        {**MESSAGES[0], "role": "system"},
        MESSAGES[1],
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]},
        *MESSAGES[3:],
    ]
    expected = tokenizer.apply_chat_template(as_files_have_them, tokenize=False, add_generation_prompt=True)
    found = render_prompt(tokenizer, asked.messages)
    assert found == expected
    for text in ("Be\nbrief", "  1 + 1?", '<tool_call>\n{"name": "add", "arguments": {"x": 1}}', "2 is two"):
        assert text in found
