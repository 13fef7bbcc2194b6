"""Renders the cards in this folder, each from its facts.json.

python model_cards/render.py              # all of them
python model_cards/render.py RUN NAME     # first take the facts and the picture of a run into the folder NAME
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from gpt_kit_hf.hub.card.card import CARD_FILE, card_facts, render_card
from gpt_kit_hf.storage.atomic_files import save_json

FACTS_FILE, CURVE_FILE = "facts.json", "loss.png"
CARDS = Path(__file__).parent


def take(run: Path, folder: Path) -> None:
    """Write a run's facts and its picture, if it has one, into a folder."""
    folder.mkdir(exist_ok=True)
    save_json(folder / FACTS_FILE, card_facts(run))
    if (run / CURVE_FILE).is_file():
        shutil.copyfile(run / CURVE_FILE, folder / CURVE_FILE)
    else:
        (folder / CURVE_FILE).unlink(missing_ok=True)


def render(folder: Path) -> None:
    """Write the card of the facts in a folder."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    (folder / CARD_FILE).write_text(render_card(facts), encoding="utf-8", newline="\n")


def main(arguments: list[str]) -> int:
    """Do what the command line says; return its exit code."""
    if len(arguments) not in (0, 2):
        sys.stderr.write("usage: python model_cards/render.py [RUN NAME]\n")
        return 2
    if arguments:
        take(Path(arguments[0]), CARDS / arguments[1])
    for facts in sorted(CARDS.glob(f"*/{FACTS_FILE}")):
        render(facts.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
