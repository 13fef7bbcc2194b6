"""Commands whose output goes to a terminal or file that is not UTF-8: what cannot be shown is escaped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_command_line import SHORT, TINY

from gpt_kit_hf.commands.main import COMMANDS

TEXT = "Größe, naïve 北京 привет — “quoted” 👍 ═\n"
STREAMS = {
    "ascii": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
# Every command line in one process: an import of torch takes seconds.
PROGRAM = """
import shlex, sys
from gpt_kit_hf.commands.main import main
for line in sys.argv[1].splitlines():
    try:
        code = main(shlex.split(line))
    except SystemExit as ended:
        code = ended.code
    print("CODE", code, flush=True)
"""


def run_lines(lines: list[str], environment: dict[str, str], folder: Path) -> tuple[list[str], str]:
    """The exit codes of command lines in one process whose streams have an encoding, and all that they wrote."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    environment = {**kept, **path, "HF_DATASETS_CACHE": str(folder / "cache"), **environment}
    command = [sys.executable, "-c", PROGRAM, "\n".join(lines)]
    # The environment decides how arguments are read: UTF-8 in, as a terminal sends it.
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=False)
    said = (ended.stdout + ended.stderr).decode("cp1252" if "1252" in str(environment) else "ascii")
    assert "Traceback" not in said, said
    return [line.split()[1] for line in said.splitlines() if line.startswith("CODE ")], said


@pytest.mark.parametrize(
    "streams",
    [pytest.param("ascii", marks=pytest.mark.slow), pytest.param("cp1252", marks=pytest.mark.slow), "C locale"],
)
def test_no_command_fails_on_a_character_that_cannot_be_shown(streams: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    row = '{"instruction": "Grüße 北京", "input": "", "output": "日本 👍"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 20, encoding="utf-8")
    (tmp_path / "chat.yaml").write_text("prompt: 北é\n", encoding="utf-8")
    (tmp_path / "train.yaml").write_text("sample_prompt: Größe 北\n", encoding="utf-8")
    shape = " ".join([*TINY, *SHORT])
    lines = [
        *(f"{name} --help" for name in COMMANDS),
        f"train --text_files text.txt --output_dir run --config train.yaml --sample_steps 1 {shape}",
        "generate run --config chat.yaml --max_new_tokens 8 --seed 1",
        "inspect rows.jsonl",
        "evaluate run text.txt",
        "card run",
        "verify run",
        "train --print_config --text_files text.txt --output_dir other",
    ]
    codes, said = run_lines(lines, STREAMS[streams], tmp_path)
    assert codes == ["0"] * len(lines), said
    shown = "é" if streams == "cp1252" else r"\xe9"
    assert rf"\u5317{shown}" in said  # the prompt
    assert r"\u65e5\u672c \U0001f44d" in said  # the rows
    log = (tmp_path / "run" / "options.json").read_text(encoding="utf-8")
    assert "Größe 北" in log or r"Gr\u00f6\u00dfe \u5317" in log


def test_an_argument_that_the_process_cannot_read_is_refused(tmp_path: Path) -> None:
    codes, said = run_lines(["generate run --prompt 北é"], STREAMS["C locale"], tmp_path)
    assert codes == ["2"]
    assert "is not in this process's encoding, " in said
    assert "set PYTHONUTF8=1" in said
