"""CPU seconds of every `--help`, of refused command lines and of imports, and seconds from `gpt-kit train` to a step.

`python benchmarks/startup.py` runs each in processes of its own, in turns, the peer's import of GPT-2 among them, and
prints medians. The run's text is the source of Python's standard library, as in `make quickstart`; its first time
includes reading and encoding it, the second finds it encoded.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measure

import gpt_kit_hf
from gpt_kit_hf.commands.main import COMMANDS as NAMES

GPT_KIT = [sys.executable, "-m", "gpt_kit_hf.commands.main"]
TRAIN = [
    "train", "--text_files", "python-stdlib", "--encoding", "bytes", "--model", "nano-xs", "--n_layer", "4",
    "--n_embd", "128", "--max_steps", "1", "--logging_steps", "1", "--max_eval_samples", "1", "--report_to", "none",
]  # fmt: skip
REFUSED = {
    "a wrong option": ["train", "--bath_size", "8"],
    "a missing file": ["train", "--output_dir", "x", "--text_files", "nowhere.txt"],
    "an unreadable config": ["train", "--config", "nowhere.yaml"],
    "a missing model": ["generate", "./nowhere"],
}
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "gpt-kit --help": [*GPT_KIT, "--help"],
    **{f"gpt-kit {name} --help": [*GPT_KIT, name, "--help"] for name in NAMES},
    **{f"refused: {name}": [*GPT_KIT, *arguments] for name, arguments in REFUSED.items()},
    "import torch": [sys.executable, "-c", "import torch"],
    "import PreTrainedModel of transformers": [sys.executable, "-c", "from transformers import PreTrainedModel"],
    "import GPT-2 of transformers": [sys.executable, "-c", "from transformers import GPT2LMHeadModel, AutoTokenizer"],
    "import gpt_kit_hf": [sys.executable, "-c", "import gpt_kit_hf"],
    "import our model": [sys.executable, "-c", "from gpt_kit_hf import GPTKitForCausalLM"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure_commands(options, {**COMMANDS, **commands_with_files(Path(folder))})


def commands_with_files(folder: Path) -> dict[str, list[str]]:
    """Return the commands that need files: a row without an answer, and a small model."""
    row, model = folder / "row.jsonl", str(folder / "model")
    row.write_text('{"instruction": "Say hello.", "input": ""}\n')
    config = gpt_kit_hf.create_model_config("nano-xs", vocab_size=257)
    gpt_kit_hf.GPTModel(config).save_pretrained(model)
    gpt_kit_hf.save_tokenizer(gpt_kit_hf.get_encoding("bytes"), model)
    load = f"import gpt_kit_hf; from transformers import AutoModelForCausalLM as M; M.from_pretrained({model!r})"
    return {
        "refused: inspect, a row without an answer": [*GPT_KIT, "inspect", str(row)],
        "load our model": [sys.executable, "-c", load],
        "gpt-kit generate, its first token": [*GPT_KIT, "generate", model, "--prompt", "a", "--max_new_tokens", "1"],
    }


def measure_commands(options: argparse.Namespace, commands: dict[str, list[str]]) -> None:
    for name, command in commands.items():  # each ends as it should
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == (2 if name.startswith("refused") else 0), (name, ended.stderr)
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.rounds + 1):
        for name, command in commands.items():
            seconds = cpu_seconds(command)
            if turn:  # the first fills the disk's cache
                taken[name].append(seconds)
    print(f"machine  {measure.machine('cpu')}; {measure.versions('torch', 'transformers', 'datasets')}")
    rows = [[name, f"{statistics.median(seconds):.2f} CPU s"] for name, seconds in taken.items()]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            rows.append([f"gpt-kit train to its first step, the {name} time", f"{to_first_step(Path(folder)):.1f} s"])
    measure.show(rows, ["", "median"])
    measure.keep(options.json, taken)


def cpu_seconds(command: Sequence[str]) -> float:
    """Return the user and system seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
