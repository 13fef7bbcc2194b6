"""Chat templates of unknown origin: rendered once in a process with limited time and memory before anything uses them.

A template is a program. transformers renders it in Jinja's sandbox, which denies it files and Python, but not endless
loops and texts of many gigabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.tokenization.chat_templates import template_name

_MAX_CHARACTERS = 1 << 20  # of a template, and of its output for a short conversation
_SECONDS, _MEGABYTES = 5, 1024  # of processor time and of memory, after all imports

_CHILD = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
template = json.load(sys.stdin)
turns = [{{"role": ("user", "assistant")[n % 2], "content": "Hello, how are you? " * 20}} for n in range(21)]
try:
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + {seconds}
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    with open("/proc/self/statm") as pages:
        mapped = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ({megabytes} << 20),) * 2)
except (ImportError, OSError, ValueError):
    pass  # a system without such limits: the parent's timeout still holds
try:
    for messages in (turns[:1], turns):
        rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        if len(rendered[0]) > {characters}:
            print("it writes more than {characters:,} characters for a short conversation")
            break
except MemoryError:
    print("it needs more than {megabytes:,} MB of memory")
except Exception:
    pass  # a template may refuse these messages
"""


def check_templates(folder: Path) -> None:
    """Raise CheckpointError if a chat template of the folder needs too much time or memory, or writes too much.

    Templates of this package are known and not tried. A template may still behave otherwise on other messages.
    """
    for name, template in _templates(folder):
        fault = None if template_name(template) else _fault(template)
        if fault is not None:
            raise CheckpointError(f"{folder / name}: the chat template is not used: {fault}")


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file name, template) for each template that the folder's tokenizer would have."""
    for path in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if path.is_file():
            yield path.name, path.read_text(encoding="utf-8", errors="replace")
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        found = json.loads(path.read_bytes()).get("chat_template") if path.is_file() else None
        for each in found if isinstance(found, list) else [{"template": found}]:  # a list names several templates
            if isinstance(each, dict) and isinstance(each.get("template"), str):
                yield path.name, each["template"]


def _fault(template: str) -> str | None:
    """Return why a template cannot be used, None if it kept within the limits."""
    if len(template) > _MAX_CHARACTERS:
        return f"it has {len(template):,} characters; {_MAX_CHARACTERS:,} are allowed"
    source = _CHILD.format(seconds=_SECONDS, megabytes=_MEGABYTES, characters=_MAX_CHARACTERS)
    with tempfile.TemporaryDirectory() as empty:
        try:
            ended = subprocess.run(
                [sys.executable, "-c", source],
                input=json.dumps(template),
                capture_output=True,
                text=True,
                check=False,
                cwd=empty,
                timeout=20 * _SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"it takes longer than {20 * _SECONDS} s"
    if ended.returncode < 0:
        return f"it takes more than {_SECONDS} s of processor time"
    return ended.stdout.strip() or (None if ended.returncode == 0 else "the test of it failed")
