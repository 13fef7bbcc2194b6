"""What the studies of shapes share: two corpora, one training run with the fast recipe, and a file of results.

A run is a line of JSON. A study that is started again with the same file goes on with the runs that are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import measure
import torch
from accelerate import Accelerator

from gpt_kit_hf import (
    AMPTrainer,
    Batch,
    EncodingOptions,
    GPTKitForCausalLM,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    WindowOptions,
    choose_encoding,
    create_optimizer,
    save_tokenizer,
    train,
)
from gpt_kit_hf.model.presets import build_config

# The recipe `fast` as it was when the results of the studies were made.
FAST = OptimizerOptions(
    optimizer="muon", muon_learning_rate=8e-3, learning_rate=4e-3, lr_scheduler_type="linear", min_lr_ratio=0.02,
    warmup_steps=60,
)  # fmt: skip
CORPORA = ("tinyshakespeare", "python-stdlib")
BYTES, BPE = 258, 4096  # ids, with the end of text and the padding


@dataclasses.dataclass(frozen=True)
class Work:
    """A corpus as it is trained on: its text, its tokens, its batches."""

    text: TextOptions
    encoding: EncodingOptions
    vocabulary: int
    context: int
    batch: int


def add_options(parser: argparse.ArgumentParser, results: str) -> None:
    """Add what every study takes."""
    parser.add_argument("text", help="tinyshakespeare.txt")
    parser.add_argument("--results", default=results, help="file of the runs; those in it are not repeated")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=CORPORA)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="none: no training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")


def work_of(corpus: str, options: argparse.Namespace, context: int, batch: int, held_out: float) -> Work:
    """Return Shakespeare's plays by bytes, or Python's standard library by a BPE of 4,096 tokens.

    `held_out` is the fraction of the text that no model is trained on.
    The BPE is trained once and kept beside the results, so that all runs have the same tokens.
    """
    if corpus == "tinyshakespeare":
        plays = TextOptions(text_files=[options.text], eval_fraction=held_out)
        return Work(plays, EncodingOptions(encoding="bytes"), BYTES, context, batch)
    code = TextOptions(text_files=[corpus], eval_fraction=held_out)
    folder = Path(options.results).with_suffix(".bpe")
    if not folder.is_dir():
        save_tokenizer(choose_encoding(code, EncodingOptions(vocab_size=BPE)), folder)
    return Work(code, EncodingOptions(encoding=str(folder)), BPE, context, batch)


def parameters(model: ModelOptions, vocabulary: int) -> int:
    """Return the number of parameters of a model, without making it."""
    with torch.device("meta"):
        return int(GPTKitForCausalLM(build_config(model, vocab_size=vocabulary)).num_parameters())


def of_size(model: ModelOptions, vocabulary: int, wanted: int) -> ModelOptions:
    """Return the model with as many parameters as `wanted`, by the width of its feed-forward layers."""
    eight, sixteen = (parameters(dataclasses.replace(model, n_inner=n), vocabulary) for n in (8, 16))
    return dataclasses.replace(model, n_inner=8 * round(1 + (wanted - eight) / (sixteen - eight)))


def steps_of(
    models: Mapping[str, ModelOptions],
    vocabulary: int,
    context: int,
    batch: int,
    optimizers: Mapping[str, OptimizerOptions] | None = None,
) -> dict[str, Any]:
    """Return a training step of each model, all on the same batch of random ids; `optimizers` are FAST by default."""
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (batch, context + 1))
    pairs = Batch(ids[:, :-1], ids[:, 1:])
    trainers = {}
    for name, shape in models.items():
        model = GPTKitForCausalLM(build_config(shape, vocab_size=vocabulary))
        optimizer = create_optimizer(model, FAST if optimizers is None else optimizers[name])
        trainers[name] = AMPTrainer(model, optimizer, accelerator=Accelerator(cpu=True))
    return {name: lambda trainer=trainer: trainer.update([pairs]) for name, trainer in trainers.items()}


def trained(
    work: Work,
    model: ModelOptions,
    steps: int,
    seed: int,
    eval_steps: int | None = None,
    optimizer: OptimizerOptions = FAST,
    *,
    best: bool = False,
) -> dict[str, Any]:
    """Train once; return the score on the whole held-out text, and the losses on the way.

    The score is that of the weights after the last step, or with `best` of those of the best evaluation.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = run_options(work, model, steps, seed, eval_steps or steps, Path(folder) / "run")
        training = dataclasses.replace(options.training, load_best_model_at_end=best)
        result = train(dataclasses.replace(options, training=training, optimizer=optimizer), stream=None)
        curve = list(evaluations(result.folder / "metrics.jsonl"))
    score = result.evaluation
    return {
        "loss": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "parameters": parameters(model, work.vocabulary),
        "curve": curve,
        "versions": measure.versions("torch", "transformers"),
    }


def run_options(work: Work, model: ModelOptions, steps: int, seed: int, eval_steps: int, folder: Path) -> RunOptions:
    return RunOptions(
        training=TrainingOptions(
            output_dir=str(folder), use_cpu=True, seed=seed, batch_size=work.batch, max_steps=steps,
            eval_steps=eval_steps, max_eval_samples=64, save_steps=100_000, sample_steps=0, report_to=["none"],
        ),
        text=work.text,
        encoding=work.encoding,
        windows=WindowOptions(max_length=work.context, stride=work.context),
        model=model,
        optimizer=FAST,
    )  # fmt: skip


def evaluations(metrics: Path) -> Iterator[tuple[int, float]]:
    """Yield step and loss of each evaluation of a run."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "eval":
            yield entry["step"], entry["loss"]


class Results:
    """A file of results, a line each: facts that identify it, and what was found."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def find(self, **facts: Any) -> list[dict[str, Any]]:
        """Return the results that have these facts, also those that another process has just added."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [line for line in map(json.loads, lines) if all(line.get(name) == it for name, it in facts.items())]

    def add(self, facts: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Append a result."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps({**facts, **found}) + "\n")
