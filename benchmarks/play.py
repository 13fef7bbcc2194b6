"""Milliseconds that the page of `gpt-kit play` waits for an answer, with a 124M model.

`python benchmarks/play.py` writes a randomly initialised gpt2-small with GPT-2's vocabulary, starts `gpt-kit play` on
it, and asks over HTTP what the page asks: the first answer after the address is announced, then for keys at the end of
a text of 64 tokens, and for keys at its start, where nothing can be reused. It prints medians and the worst.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch

from gpt_kit_hf import GPTModel, create_model_config, get_encoding
from gpt_kit_hf.hub.model_folder import write_model_folder

# 64 tokens of GPT-2 with the one that begins a text.
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring"
)
KEYS = " of hope, it was the winter of"


class Page:
    """What the page does: it asks for one thing after another over one connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.split("/")[2])

    def ask(self, path: str, **fields: Any) -> tuple[float, dict[str, Any]]:
        """Return the milliseconds until the whole answer was read, and the answer."""
        body = json.dumps({"page": "benchmark", "model": "0", **fields})
        began = time.perf_counter()
        self._connection.request("POST", f"/{path}", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        said = answer.read()
        taken = 1000 * (time.perf_counter() - began)
        if answer.status != 200:
            raise SystemExit(f"{path}: {said.decode()}")
        return taken, json.loads(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-small", help="shape of the model")
    measure.add_options(parser, rounds=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        write_model_folder(Path(folder), GPTModel(create_model_config(options.preset)).eval(), get_encoding("gpt2"))
        figures = measure_page(folder, options)
    print(measure.machine(options.device))
    rows = [(name, f"{statistics.median(taken):.0f}", f"{max(taken):.0f}") for name, taken in figures.items()]
    measure.show(rows, ("milliseconds", "median", "worst"))
    measure.keep(options.json, figures)


def measure_page(folder: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return {what: [milliseconds of each time]}."""
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", "play", folder, "--device", options.device]
    figures: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            page = Page(found[0])
            opened, first = page.ask("open")[0], page.ask("read", text=TEXT)
            assert len(first[1]["ids"]) == 63, len(first[1]["ids"])
            taken = {"the first answer, 64 tokens": [opened + first[0]]}
            if turn == options.rounds - 1:
                taken |= keys(page)
            for name, values in taken.items():
                figures.setdefault(name, []).extend(values)
        finally:
            process.terminate()
            process.communicate()
    return figures


def keys(page: Page) -> dict[str, list[float]]:
    """Return the milliseconds of many answers to one page."""
    at_end = [page.ask("read", text=TEXT + KEYS[:n])[0] for n in range(1, len(KEYS))]
    at_start = [page.ask("read", text=KEYS[-n:] + TEXT)[0] for n in range(1, len(KEYS))]
    ids = page.ask("read", text=TEXT)[1]["ids"]
    sampling = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    return {
        "a key at the end": at_end,
        "a key at the start": at_start,
        "a slider of sampling": [page.ask("sampling", ids=ids, sampling=sampling)[0] for _ in range(9)],
        "attention of another text": [
            page.ask("attention", ids=ids[: 60 + n % 4], layer=3, head=2)[0] for n in range(9)
        ],
        "attention, another head": [page.ask("attention", ids=ids[:60], layer=n, head=n)[0] for n in range(9)],
        "the logit lens, 12 tokens": [page.ask("lens", ids=ids, position=40 + n)[0] for n in range(9)],
    }


if __name__ == "__main__":
    main()
