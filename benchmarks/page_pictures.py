"""The pictures of gpt-kit watch and gpt-kit report in docs/images.

`python benchmarks/page_pictures.py runs/one runs/two` opens both pages in a headless Chromium, the report of the first
run, and writes watch.png, report.png, report-tokens.png and curve.png, the run's loss.png. Needs Chromium and Pillow.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT / "tests" / "pages"))

from browser import Browser, Page, browser  # noqa: E402
from conftest import serving  # noqa: E402

from gpt_kit_hf.pages.report import write_report  # noqa: E402
from gpt_kit_hf.pages.watch import watch_app  # noqa: E402

IMAGES = ROOT / "docs" / "images"
DRAWN = "document.querySelectorAll('.chart-line').length > 3"


def save(page: Page, name: str) -> None:
    """Write the window as a PNG of few colours, which is small."""
    path = IMAGES / f"{name}.png"
    page.picture(path, whole=False)
    assert not page.problems, page.problems
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def picture_watch(browser: Browser, runs: list[Path]) -> None:
    with serving(watch_app(runs)) as url, browser.page(width=1240, height=1180) as page:
        page.open(url)
        page.wait(DRAWN)
        box = page.js("(b => [b.x, b.y])(document.querySelector('#loss svg').getBoundingClientRect())")
        page.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 620, y=box[1] + 120)
        save(page, "watch")


def picture_report(browser: Browser, run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, browser.page(width=1240, height=900) as page:
        file = Path(folder) / "report.html"
        write_report(run, file, text_files=None, tokens=1024, device="cpu", announce=print)
        page.open(f"file://{file}")
        page.wait(DRAWN)
        save(page, "report")
        page.js("document.querySelector('#tokens').scrollIntoView()")
        save(page, "report-tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    with browser() as opened:
        picture_watch(opened, runs)
        picture_report(opened, runs[0])
    shutil.copyfile(runs[0] / "loss.png", IMAGES / "curve.png")


if __name__ == "__main__":
    main()
