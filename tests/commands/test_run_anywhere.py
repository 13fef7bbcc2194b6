"""The examples of docs/run-anywhere.md that say that they are tested: each says what `gpt-kit generate` says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import gpt_kit
from test_docs import ROOT, code_blocks, shell_lines
from tiny_model import write_tiny_model

PAGE = ROOT / "docs" / "run-anywhere.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n+(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S))
TESTED = [name for name, text in SECTIONS.items() if text.startswith("Tested.")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run, and with what the page's first commands write."""
    place = tmp_path_factory.mktemp("anywhere")
    write_tiny_model(place / "runs" / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for command in first_commands():
            ended = gpt_kit(*command)
            assert ended.exit_code == 0, ended.stderr
    return place


def first_commands() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    return [shlex.split(line)[1:] for line in shell_lines(PAGE) if line and text.index(line) < text.index("\n## ")]


def section(name: str, place: Path) -> Path:
    """A page of one section, up to what it says is not tested."""
    page = place / f"{name}.md"
    page.write_text(re.split(r"^.*not tested here.*$", SECTIONS[name], flags=re.M)[0], encoding="utf-8")
    return page


def test_every_section_says_whether_it_is_tested() -> None:
    assert TESTED == ["transformers", "llama.cpp", "ONNX"]
    assert all(text.startswith(("Tested.", "Not tested here.")) for text in SECTIONS.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "ONNX" else name for name in TESTED]
)
def test_the_example_says_what_generate_says(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    asked = re.search(r"`gpt-kit (generate runs/mine .*?)`", PAGE.read_text(encoding="utf-8"))
    assert asked is not None
    expected = gpt_kit(*shlex.split(asked[1])).stdout
    assert len(set(expected)) > 8
    page = section(name, place)
    if name == "llama.cpp":
        pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'gpt-kit-hf[llama]'")
        (line,) = shell_lines(page)
        ended = gpt_kit(*shlex.split(line)[1:])
        assert (ended.exit_code, ended.stdout) == (0, expected)
        return
    (code,) = code_blocks(page, "python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(expected)
