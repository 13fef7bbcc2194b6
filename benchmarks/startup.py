"""How long a user waits: `gpt-kit --help`, the import, and from `gpt-kit train` to the first step.

`python benchmarks/startup.py` runs each in processes of its own, in turns, the peer's import of GPT-2 among them, and
prints medians. The run's text is the source of Python's standard library, as in `make quickstart`; its first time
includes reading and encoding it, the second finds it encoded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measure

GPT_KIT = [sys.executable, "-c", "from gpt_kit_command import main; main()"]
TRAIN = [
    "train", "--text_files", "python-stdlib", "--encoding", "bytes", "--model", "nano-xs", "--n_layer", "4",
    "--n_embd", "128", "--max_steps", "1", "--logging_steps", "1", "--max_eval_samples", "1", "--report_to", "none",
]  # fmt: skip
COMMANDS = {
    "gpt-kit --help": [*GPT_KIT, "--help"],
    "gpt-kit train --help": [*GPT_KIT, "train", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import GPT-2 of transformers": [sys.executable, "-c", "from transformers import GPT2LMHeadModel, AutoTokenizer"],
    "import gpt_kit_hf": [sys.executable, "-c", "import gpt_kit_hf"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    options = parser.parse_args()
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", *GPT_KIT[1:], "--help"], capture_output=True, text=True, check=True
    )
    assert "torch" not in imported.stderr, "gpt-kit --help imports torch"
    taken = measure.interleaved(
        {name: lambda command=command: run(command) for name, command in COMMANDS.items()},
        options.rounds,
        "cpu",
        warm_up=1,
    )
    print(f"machine  {measure.machine('cpu')}; {measure.versions('torch', 'transformers', 'datasets')}")
    rows = [[name, f"{statistics.median(seconds):.2f} s"] for name, seconds in taken.items()]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            rows.append([f"gpt-kit train to its first step, the {name} time", f"{to_first_step(Path(folder)):.1f} s"])
    measure.show(rows, ["", "median"])
    measure.keep(options.json, taken)


def run(command: Sequence[str]) -> None:
    subprocess.run(command, capture_output=True, check=True)


def to_first_step(folder: Path) -> float:
    """Return the seconds until the run prints its first step; the encoded text stays in the folder's cache."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = time.perf_counter()
    command = [*GPT_KIT, *TRAIN, "--output_dir", str(folder / "run")]
    cached = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=cached) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "step 1/1" in line:
                seconds = time.perf_counter() - began
                process.wait()
                return seconds
    raise SystemExit("the run printed no step:\n" + "".join(lines))


if __name__ == "__main__":
    main()
