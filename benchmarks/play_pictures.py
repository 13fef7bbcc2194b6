"""Take the pictures of docs/playing.md: each view of `gpt-kit play` in a headless Chromium.

`python benchmarks/play_pictures.py RUN TUNED docs/images` needs a run of Shakespeare and one that was tuned from it;
docs/playing.md has their commands.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from browser import Page, browser

TEXT = "KING RICHARD:\nWhat is the matter with the king, my lord?\nThe queen hath sent for thee, and she"
QUESTION = "Rewrite the sentence in the past tense: She sings a song."
COLOURS = 128  # of a picture, for a small file
# Of each picture: the view, its width, dark or not, what to wait for, and what to do before.
VIEWS = {
    "loss": (1100, False, "#surprises li", ()),
    "sampling": (1100, False, "#sampling-bars div", (("choose", "#top-k", "8"), ("choose", "#temperature", "0.7"))),
    "attention": (1100, True, "#attention-tokens .token", (("choose", "#layer", "1"),)),
    "lens": (1100, False, "#lens td", ()),
    "compare": (1100, False, "#most td", ()),
    "curves": (1100, True, "#curves svg path", ()),
    "chat": (480, False, "#conversation .trained", ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("tuned")
    parser.add_argument("folder", type=Path, help="where the pictures are written, as play-VIEW.png")
    options = parser.parse_args()
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", "play", options.run, options.tuned]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        with browser() as running:
            for view, (width, dark, shown, steps) in VIEWS.items():
                with running.page(width=width, height=700, dark=dark) as page:
                    page.open(found[0])
                    page.wait("document.body.dataset.state === 'ready'")
                    prepare(page, view, steps)
                    page.wait(f"document.querySelector({shown!r}) !== null", seconds=60)
                    page.settle()
                    picture = options.folder / f"play-{view}.png"
                    page.picture(picture)
                    Image.open(picture).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
                        picture, optimize=True
                    )
                    assert page.problems == [], page.problems
    finally:
        process.terminate()
        process.communicate()


def prepare(page: Page, view: str, steps: tuple[tuple[str, str, str], ...]) -> None:
    """Write the text or the message, and go to the view."""
    if view == "chat":
        key = page.js("[...document.querySelector('#model').options].find(o => o.value.startsWith('1')).value")
        page.choose("#model", key)
        page.wait(f"document.body.dataset.state === 'ready' && document.querySelector('#model').value === '{key}'")
        page.choose("#temperature", "0")
        page.click("[data-tab=chat]")
        page.write("#line", QUESTION)
        page.click("#say .strong")
        return
    page.write("#text", TEXT)
    page.wait("document.querySelectorAll('#tokens [data-id]').length > 20")
    page.click(f"[data-tab={view}]")
    if view == "compare":
        page.wait("document.querySelector('#other').options.length > 1")
        keys = page.js(
            "[...document.querySelector('#other').options].map(o => o.value).filter(v => v.startsWith('0/'))"
        )
        page.choose("#other", keys[-1])  # the first checkpoint
    elif view == "loss":
        page.click("#tokens [data-n='10']")
    for method, *given in steps:
        getattr(page, method)(*given)


if __name__ == "__main__":
    main()
