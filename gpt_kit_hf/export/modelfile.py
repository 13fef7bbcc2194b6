"""The Modelfile of a GGUF file: what Ollama needs to know of it. Source: Ollama's documentation of the format."""

from __future__ import annotations

from gpt_kit_hf.tokenization.chat_templates import template_name
from gpt_kit_hf.tokenization.export import EOS_TOKEN

# The templates of this package in Ollama's language, in which a conversation is `.Messages`.
_SYSTEM = {"default": "### System:\n{{ .Content }}\n\n", "alpaca": "{{ .Content }}\n\n"}
_HEADERS = {"default": ("### User:", "### Assistant:"), "alpaca": ("### Instruction:", "### Response:")}
_ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def modelfile(gguf_name: str, *, context: int, chat_template: str | None) -> str:
    """Return the text of a Modelfile for a GGUF file beside it; `context` is in tokens.

    A chat template that is not one of this package cannot be written in Ollama's language: Ollama reads it from the
    GGUF file, if it knows it.
    """
    lines = [f"FROM ./{gguf_name}", f"PARAMETER num_ctx {context}", f'PARAMETER stop "{EOS_TOKEN}"']
    known = template_name(chat_template)
    if chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')  # it continues a text
    elif known is not None:
        lines.append(f'TEMPLATE """{_template(known)}"""')
    return "\n".join(lines) + "\n"


def _template(name: str) -> str:
    user, assistant = _HEADERS[name]
    opening = ""
    if name == "alpaca":
        opening = f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_ALPACA_OPENING}{{{{ end }}}}'
    return (
        "{{ range $i, $_ := .Messages }}"
        f"{opening}"
        f'{{{{ if eq .Role "system" }}}}{_SYSTEM[name]}'
        f'{{{{ else if eq .Role "user" }}}}{user}\n{{{{ .Content }}}}\n\n'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant}\n{{{{ .Content }}}}{EOS_TOKEN}{{{{ end }}}}'
        f"{{{{ end }}}}{assistant}\n"
    )
