"""Chat templates of strangers: tried in a process with little time and memory before anything else renders them.

A template is a program. transformers renders it in Jinja's sandbox, which keeps it from files and from Python, but not
from loops without end and texts of many gigabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.tokenization.chat_templates import CHAT_TEMPLATES

_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_MOST_CHARACTERS = 1 << 20  # of a template, and of what it writes for a short conversation
_SECONDS, _MEGABYTES = 5, 1024  # of processor time and of memory, after everything is imported

_CHILD = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
template = json.load(sys.stdin)
turns = [{{"role": ("user", "assistant")[n % 2], "content": "Hello, how are you? " * 20}} for n in range(21)]
try:
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + {seconds}
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    with open("/proc/self/statm") as pages:
        mapped = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ({megabytes} << 20),) * 2)
except (ImportError, OSError, ValueError):
    pass  # a system without such limits: the time that the parent waits is one
try:
    for messages in (turns[:1], turns):
        rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
        if len(rendered[0]) > {characters}:
            print("it writes more than {characters:,} characters for a short conversation")
            break
except MemoryError:
    print("it needs more than {megabytes:,} MB of memory")
except Exception:
    pass  # it refuses these messages, as it may
"""


def check_templates(folder: Path) -> None:
    """Raise CheckpointError if a chat template of the folder asks for too much time, memory or text.

    Those of this package are known and not tried. A template may still treat other messages otherwise.
    """
    for name, template in _templates(folder):
        if template in CHAT_TEMPLATES.values():
            continue
        fault = _fault(template)
        if fault is not None:
            raise CheckpointError(f"{folder / name}: the chat template is not used: {fault}")


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the templates that a tokenizer would have, with their files."""
    paths = [folder / name for name in _FILES]
    for path in [*paths, *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if not path.is_file():
            continue
        if path.suffix == ".jinja":
            yield path.name, path.read_text(encoding="utf-8", errors="replace")
            continue
        found = json.loads(path.read_bytes()).get("chat_template")
        if isinstance(found, str):
            yield path.name, found
        elif isinstance(found, list):  # several, by name
            yield from ((path.name, str(each.get("template", ""))) for each in found if isinstance(each, dict))


def _fault(template: str) -> str | None:
    """Return why a template cannot be used, None if it kept within the limits."""
    if len(template) > _MOST_CHARACTERS:
        return f"it has {len(template):,} characters; {_MOST_CHARACTERS:,} are allowed"
    source = _CHILD.format(seconds=_SECONDS, megabytes=_MEGABYTES, characters=_MOST_CHARACTERS)
    with tempfile.TemporaryDirectory() as place:
        try:
            ended = subprocess.run(
                [sys.executable, "-c", source],
                input=json.dumps(template),
                capture_output=True,
                text=True,
                check=False,
                cwd=place,
                timeout=20 * _SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"it takes longer than {20 * _SECONDS} s"
    if ended.returncode < 0:
        return f"it takes more than {_SECONDS} s of processor time"
    return ended.stdout.strip() or (None if ended.returncode == 0 else "trying it failed")
