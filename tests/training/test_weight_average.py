"""The moving average of the weights: against the formula, in what is evaluated and saved, and when a run resumes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import killed_copy
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from gpt_kit_hf import (
    EncodingOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    WindowOptions,
    train,
)
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.training.optim.weight_average import WeightAverage
from gpt_kit_hf.training.replay import replay_steps
from gpt_kit_hf.training.task import Sample
from gpt_kit_hf.training.text_task import TextTask
from gpt_kit_hf.training.verify import verify_run

STEPS, DECAY = 12, 0.9


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of three documents, which a run of these steps reads about twice."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    letters = [chr(97 + int(each)) for each in torch.randint(12, (560,), generator=generator)]
    file.write_text("<|endoftext|>\n".join("".join(letters[first : first + 200]) for first in (0, 200, 400)))
    return file


def options(text: Path, folder: Path, ema_decay: float | None = DECAY, **training: Any) -> RunOptions:
    chosen: dict[str, Any] = {"max_steps": STEPS, "eval_steps": 4, "save_steps": 1, "save_total_limit": 99}
    return RunOptions(
        training=TrainingOptions(
            output_dir=str(folder), use_cpu=True, report_to=["none"], mixed_precision="no", batch_size=4,
            sample_steps=6, sample_max_new_tokens=15, **(chosen | training),
        ),
        text=TextOptions(text_files=[str(text)], eval_fraction=0.2),
        encoding=EncodingOptions(encoding="bytes"),
        windows=WindowOptions(max_length=16),
        model=ModelOptions(n_layer=1, n_head=2, n_embd=32, max_position_embeddings=16, dropout=0.1),
        optimizer=OptimizerOptions(
            optimizer="muon", learning_rate=5e-2, muon_beta2=0.9, weight_decay=0.5, ema_decay=ema_decay
        ),
    )  # fmt: skip


def lines(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] in kinds]


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that averages, and the same run without."""
    folder = tmp_path_factory.mktemp("runs")
    train(options(text, folder / "averaged"), stream=None)
    train(options(text, folder / "plain", None), stream=None)
    return folder


def averaged(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The formula, of the weights after each step."""
    average = dict(steps[0])
    for step, found in enumerate(steps):
        decay = min(DECAY, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * found[name] for name in average}
    return average


def test_checkpoints_and_the_published_model_hold_the_average(runs: Path) -> None:
    plain = [weights(runs / "plain", step) for step in range(1, STEPS + 1)]
    for step in (1, 5, STEPS):
        found = weights(runs / "averaged", step)
        for name, expected in averaged(plain[:step]).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["model.norm.weight"], plain[-1]["model.norm.weight"])
    published = load_file(runs / "averaged" / "model.safetensors")
    assert all(torch.equal(published[name], tensor) for name, tensor in found.items())
    assert verify_run(runs / "averaged").problems == []


def test_training_is_that_without_an_average(runs: Path) -> None:
    assert lines(runs / "averaged", "train") == lines(runs / "plain", "train")


def test_samples_are_written_by_the_average(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sample = [], TextTask.sample

    def noting(task: TextTask) -> Sample:
        seen.append({name: tensor.clone() for name, tensor in task.model.state_dict().items()})
        return sample(task)

    monkeypatch.setattr(TextTask, "sample", noting)
    train(options(text, tmp_path / "run"), stream=None)
    for step, found in zip((6, STEPS), seen, strict=True):
        for name, tensor in weights(tmp_path / "run", step).items():
            assert torch.equal(found[name], tensor)


def test_evaluations_are_the_averages(runs: Path, text: Path, tmp_path: Path) -> None:
    """A run that begins with the saved average says what it scores, before it trains."""
    found = {line["step"]: line for line in lines(runs / "averaged", "eval")}
    saved = runs / "averaged" / "checkpoints" / "step-00000004"
    base = options(text, tmp_path / "again", None)
    model = ModelOptions(model_name_or_path=str(saved))
    train(dataclasses.replace(base, model=model), stream=io.StringIO())
    (again,) = (line for line in lines(tmp_path / "again", "eval") if line["step"] == 0)
    assert again["loss"] == pytest.approx(found[4]["loss"], abs=1e-6)
    assert found[4]["loss"] != {line["step"]: line for line in lines(runs / "plain", "eval")}[4]["loss"]


@pytest.mark.parametrize("kept", [3, 8])
def test_a_killed_run_continues_to_the_bit(kept: int, runs: Path, text: Path, tmp_path: Path) -> None:
    """With an average, dropout, decay, scaled rows and reshuffled windows, before and after the second epoch."""
    later = [f"step-{step:08d}" for step in range(kept + 1, STEPS + 1)]
    cut = killed_copy(runs / "averaged", tmp_path / "cut", *later)
    train(options(text, cut, resume=True), stream=None)
    assert lines(cut, "train", "eval", "sample") == lines(runs / "averaged", "train", "eval", "sample")
    for step in (kept + 1, STEPS):
        for one, other in zip(weights(cut, step).values(), weights(runs / "averaged", step).values(), strict=True):
            assert torch.equal(one, other)
    (_, *files) = sorted((cut / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    for file in files:
        whole = load_file(runs / "averaged" / "checkpoints" / f"step-{STEPS:08d}" / file.name)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(file).items())


def test_steps_are_replayed_from_an_averaged_checkpoint(runs: Path) -> None:
    assert replay_steps(runs / "averaged", 6, 9, log=print).text() == "steps 6 to 9: identical"


def test_the_best_checkpoint_is_published_with_the_score_of_its_average(text: Path, tmp_path: Path) -> None:
    chosen = {"max_steps": 60, "load_best_model_at_end": True, "save_steps": 4}
    run = tmp_path / "run"
    found = train(options(text, run, **chosen), stream=None)
    record = json.loads((run / "run.json").read_text())
    step = record["results"]["published_step"]
    assert step < 60
    assert all(
        torch.equal(tensor, weights(run, step)[name]) for name, tensor in load_file(run / "model.safetensors").items()
    )
    scored = {line["step"]: line["loss"] for line in lines(run, "eval")}
    # The evaluation text is so short that each evaluation has all of it.
    assert found.evaluation.loss == pytest.approx(scored[step], abs=1e-6)


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_only_what_was_updated_has_an_average(kind: Any) -> None:
    """A parameter without a gradient keeps an empty state, which the optimizer initialises with its first gradient."""
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = kind([used, unused], lr=0.1, **({"momentum": 0.9} if kind is SGD else {}))
    average = WeightAverage(nn.Module(), optimizer, 0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    average.update(0)
    with average.in_model(), average.in_model():
        assert torch.equal(used, optimizer.state[used]["average"]) or not used.equal(torch.ones(3))
    assert not optimizer.state[unused]
    unused.grad = torch.ones(2)
    optimizer.step()
    average.update(1)
    assert "average" in optimizer.state[unused]


def test_a_resumed_run_keeps_its_decay(runs: Path, text: Path, tmp_path: Path) -> None:
    cut = killed_copy(runs / "averaged", tmp_path / "cut", f"step-{STEPS:08d}")
    with pytest.raises(UsageError, match="ema_decay"):
        train(options(text, cut, 0.8, resume=True), stream=None)
