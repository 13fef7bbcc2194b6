"""Chat templates that need too much time, memory or text are refused; others pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_kit_hf import CheckpointError, get_chat_template
from gpt_kit_hf.hub.template_sandbox import check_templates

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% if a < 0 %}x{% endif %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "takes more than 5 s of processor time"),
        ("{{ 'a' * 9000000000 }}", "needs more than 1,024 MB of memory"),
        ("{{ 'a' * 2000000 }}", "writes more than 1,048,576 characters"),
        ("{# " + "x" * (1 << 20) + " #}", "has 1,048,582 characters; 1,048,576 are allowed"),
    ],
)
def test_an_excessive_template_is_refused(template: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=rf"chat_template\.jinja: the chat template is not used: it {message}"):
        check_templates(tmp_path)


def test_known_and_plain_templates_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_templates(tmp_path)  # none at all
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": plain}))
    check_templates(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('never') }}")  # it may refuse messages
    check_templates(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(get_chat_template("alpaca"))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a template of ours is known"))
    check_templates(tmp_path)


def test_named_templates_are_checked_too(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{{ 'a' * 2000000 }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the chat template is not used"):
        check_templates(tmp_path)
