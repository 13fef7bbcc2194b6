"""Records a short run in a terminal, for the documentation.

`python benchmarks/recording.py docs/images` runs `gpt-kit train` under tmux, takes the screen in the middle of the run
and at its end, and the same run's output in a pipe. It writes terminal-live.svg, terminal-end.svg and
terminal-pipe.txt. Needs tmux.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS, STEPS = 96, 30, 400
COMMAND = (
    "gpt-kit train --output_dir runs/docs --text_files docs/*.md --encoding bytes --model nano-xs --max_length 64 "
    f"--batch_size 8 --max_steps {STEPS} --eval_steps 100 --save_steps 200 --sample_steps 200 "
    "--sample_max_new_tokens 60 --max_eval_samples 32 --use_cpu"
)
PATIENCE = 600  # seconds
# Printed by packages of some environments when they are imported.
NOISE = re.compile(r"^(Failed to load |[WI]\d{4} )")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    docs = Path(__file__).resolve().parents[1] / "docs"
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "docs").symlink_to(docs)
        middle, end = in_a_terminal(Path(place))
    save_picture(middle, folder / "terminal-live.svg", "a run on a terminal")
    save_picture(end, folder / "terminal-end.svg", "its end")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "docs").symlink_to(docs)
        ran = subprocess.run(
            ["bash", "-c", program()], cwd=place, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    (folder / "terminal-pipe.txt").write_text(ran.stdout, encoding="utf-8")


def program() -> str:
    """Return the command for a shell, with this program's Python."""
    return COMMAND.replace("gpt-kit", f"{shlex.quote(sys.executable)} -m gpt_kit_hf.commands.main", 1) + " 2>/dev/null"


def in_a_terminal(place: Path) -> tuple[str, str]:
    """Return the screen in the middle of the run and after it, with its colours as escape codes."""
    session = ["tmux", "-L", "gpt-kit-recording", "-f", "/dev/null"]
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    typed = f"clear; {program()}; echo END"
    subprocess.run([*session, "new-session", "-d", *size, "-c", str(place), "bash", "--norc"], check=True)
    try:
        subprocess.run([*session, "send-keys", typed, "Enter"], check=True)
        middle = wait_for(session, rf"step (2[3-9]\d|3\d\d) of {STEPS}")
        return middle, wait_for(session, r"^END")
    finally:
        subprocess.run([*session, "kill-server"], check=True)


def wait_for(session: list[str], pattern: str) -> str:
    """Return the screen once it shows the pattern."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        shown = subprocess.run(
            [*session, "capture-pane", "-e", "-p"], capture_output=True, text=True, check=True
        ).stdout
        if re.search(pattern, Text.from_ansi(shown).plain, flags=re.MULTILINE):
            return shown
        time.sleep(0.2)
    raise SystemExit(f"the terminal did not show {pattern!r}")


def save_picture(screen: str, path: Path, title: str) -> None:
    """Write a screen as an SVG that needs no font from elsewhere."""
    lines = [line for line in screen.rstrip().splitlines() if not NOISE.match(Text.from_ansi(line).plain)]
    lines = [line for line in lines if Text.from_ansi(line).plain.strip() not in ("END", "bash-5.2#", "bash-5.2$")]
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(lines)), soft_wrap=True)
    picture = console.export_svg(title=title, unique_id=path.stem)
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    path.write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
