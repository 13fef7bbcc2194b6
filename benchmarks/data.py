"""Tokenising a large corpus against raw tiktoken, and what the data costs a training step.

`python benchmarks/data.py --gigabytes 2` makes a corpus of so much text from the Python standard library, repeated
with variation, in a folder that it removes again. It measures

1. the tokenising throughput of `gpt_kit_hf` and of tiktoken's own `encode_ordinary_batch` with as many threads, slice
   by slice in turn, and whether both give the same number of tokens;
2. training steps on that corpus and on a small one, each in a process of its own: resident memory, and the share of a
   step that is spent waiting for data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from accelerate import Accelerator

from gpt_kit_hf import (
    AMPTrainer,
    GPTModel,
    TextOptions,
    TokenWindows,
    create_model_config,
    get_encoding,
    prepare_corpus,
)
from gpt_kit_hf.data.order import BatchPlan, ShuffledOrder
from gpt_kit_hf.data.text.shards import file_shards
from gpt_kit_hf.data.text.tokens.token_cache import store_tokens
from gpt_kit_hf.data.text.windows import collate_windows
from gpt_kit_hf.options.files import find_files
from gpt_kit_hf.options.training import TrainingOptions
from gpt_kit_hf.training.runtime.signals import StopSignals
from gpt_kit_hf.training.task import RunContext, map_batches

SMALL_MB = 20
DOCUMENT_CHARACTERS = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--encoding", default="gpt2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", help="where the corpus is made; the temporary folder if not given")
    parser.add_argument("--measure-steps", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_steps:
        sys.stdout.write(json.dumps(measure_steps(options)) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        benchmark(options, Path(folder))


def benchmark(options: argparse.Namespace, folder: Path) -> None:
    large, small = folder / "large", folder / "small"
    for place, size, files in ((large, options.gigabytes * 1e9, options.slices), (small, SMALL_MB * 1e6, 1)):
        write_corpus(place, int(size), files)
    captured = {name: version(name) for name in ("torch", "tiktoken", "datasets", "pyarrow")}
    print(f"{captured}, {options.threads} threads, encoding {options.encoding}, {options.gigabytes} GB of text")
    tokenising(options, large, folder / "cache")
    measured = []
    for place in (small, large):
        command = [sys.executable, __file__, "--measure-steps", str(place), "--folder", str(folder / "cache")]
        command += ["--encoding", options.encoding, "--steps", str(options.steps)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        measured.append(json.loads(ended.stdout.splitlines()[-1]))
        print(f"{place.name:6} corpus: {measured[-1]}")
    grown = measured[1]["resident_mb"] - measured[0]["resident_mb"]
    print(f"resident memory with the large corpus: {grown:+.0f} MB against the small one")


def write_corpus(folder: Path, size: int, files: int) -> None:
    """Write JSON lines of documents from real text, in each of which some words are exchanged or numbered."""
    folder.mkdir(parents=True)
    text = "\n".join(file.read_text("utf-8", "ignore") for file in find_files(["python-stdlib"]))
    words = sorted(set(re.findall(r"[a-z]{4,9}", text)))
    rng = random.Random(0)
    for index in range(files):
        left = size // files
        with (folder / f"{index:02}.jsonl").open("w", encoding="utf-8") as stream:
            while left > 0:
                start = rng.randrange(len(text) - DOCUMENT_CHARACTERS)
                document = text[start : start + rng.randrange(DOCUMENT_CHARACTERS // 4, DOCUMENT_CHARACTERS)]
                for _ in range(8):
                    document = document.replace(rng.choice(words), rng.choice(words) + str(rng.randrange(99)))
                line = json.dumps({"text": document}) + "\n"
                left -= len(line)
                stream.write(line)


def tokenising(options: argparse.Namespace, corpus: Path, cache: Path) -> None:
    """Each slice by both, the first one in turn, so that what else the machine does hits both alike."""
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    encoding = get_encoding(options.encoding)
    seconds = {"ours": 0.0, "raw tiktoken": 0.0}
    tokens = dict.fromkeys(seconds, 0)
    for number, file in enumerate(sorted(corpus.iterdir())):
        runs = [("ours", ours), ("raw tiktoken", raw_tiktoken)]
        for name, run in runs if number % 2 else runs[::-1]:
            made, taken = run(file, encoding, options.threads)
            tokens[name] += made
            seconds[name] += taken
    size = sum(file.stat().st_size for file in corpus.iterdir())
    assert len(set(tokens.values())) == 1, tokens
    for name, taken in seconds.items():
        print(f"{name:13} {size / taken / 1e6:6.1f} MB/s  {tokens[name] / taken:12,.0f} tokens/s")
    print(f"ratio ours / raw: {seconds['raw tiktoken'] / seconds['ours']:.2f} (ours reads, parses and stores, too)")


def ours(file: Path, encoding: Any, threads: int) -> tuple[int, float]:
    """Read, parse, encode and store; return the number of tokens and all the seconds."""
    began = time.perf_counter()
    units = file_shards([file], column="text", separator=None, may_cut=True)
    stored = store_tokens(units, encoding, threads)
    return sum(piece.size for piece in stored.chunks), time.perf_counter() - began


def raw_tiktoken(file: Path, encoding: Any, threads: int) -> tuple[int, float]:
    """Encode batches that are in memory already; return the number of tokens and the seconds of encoding alone."""
    tokens, seconds, batch = 0, 0.0, []
    with file.open(encoding="utf-8") as stream:
        for line in itertools.chain(stream, [None]):
            if line is not None:
                batch.append(json.loads(line)["text"])
            if len(batch) == 1024 or line is None:
                began = time.perf_counter()
                encoded = encoding.encode_ordinary_batch(batch, num_threads=threads)
                seconds += time.perf_counter() - began
                tokens += sum(len(ids) + 1 for ids in encoded)  # each document has an end of text with us
                batch = []
    return tokens, seconds


def measure_steps(options: argparse.Namespace) -> dict[str, float]:
    """Train on windows of a corpus; return resident memory, and how long a step waits for its batch."""
    datasets.config.HF_DATASETS_CACHE = Path(options.folder)
    datasets.disable_progress_bars()
    corpus = prepare_corpus(
        TextOptions(text_files=[f"{options.measure_steps}/*.jsonl"]), get_encoding(options.encoding), seed=0
    )
    windows = TokenWindows(corpus.train, 256, 256)
    model = GPTModel(create_model_config("nano-s", vocab_size=corpus.encoding.n_vocab, max_position_embeddings=256))
    trainer = AMPTrainer(model, torch.optim.AdamW(model.parameters()), accelerator=Accelerator(cpu=True))
    plan = BatchPlan(order=ShuffledOrder(samples=len(windows), seed=0), batch_size=8, micro_batch_size=8)
    context = RunContext(
        options=TrainingOptions(output_dir="unused"),
        accelerator=trainer.accelerator,
        console=None,  # type: ignore[arg-type]  # nothing is captured
        folder=Path(),
        checkpoint=None,
        stop=StopSignals(),
    )
    batches = map_batches(windows, collate_windows, plan, (0, options.steps + 2), context)
    waited = worked = resident = 0.0
    for step in range(options.steps + 2):
        began = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        trainer.update([batch])
        if step >= 2:  # the first ones allocate
            waited += arrived - began
            worked += time.perf_counter() - began
        resident = max(resident, psutil.Process().memory_info().rss / 1e6)
    return {
        "windows": len(windows),
        "resident_mb": round(resident),
        "step_ms": round(1000 * worked / options.steps, 1),
        "waiting_percent": round(100 * waited / worked, 3),
    }


if __name__ == "__main__":
    main()
