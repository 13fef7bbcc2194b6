"""Early stopping, the best checkpoint as the published model, and intervals that scale with the run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
from gpt_kit_hf.training.verify import verify_run

PATIENCE = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to learn by heart, whose end is another one: the score falls first, then rises."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    letters = "".join(chr(97 + int(each)) for each in torch.randint(6, (700,), generator=generator))
    file.write_text(letters)
    return file


def options(text: Path, folder: Path, **training: Any) -> RunOptions:
    chosen: dict[str, Any] = {"max_steps": 40, "eval_steps": 4, "save_steps": 4, "batch_size": 4, "sample_steps": 0}
    return RunOptions(
        training=TrainingOptions(
            output_dir=str(folder), use_cpu=True, report_to=["none"], mixed_precision="no", **(chosen | training)
        ),
        text=TextOptions(text_files=[str(text)], eval_fraction=0.3),
        encoding=EncodingOptions(encoding="bytes"),
        windows=WindowOptions(max_length=16),
        model=ModelOptions(n_layer=1, n_head=2, n_embd=32, max_position_embeddings=16),
        # A rate that does not depend on the number of steps, so that a shorter run has the same steps.
        optimizer=OptimizerOptions(learning_rate=2e-2, lr_scheduler_type="constant_with_warmup", warmup_steps=2),
    )


def scores(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "eval"}


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text())["results"])


def updates(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in ("train", "eval")]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all steps, that overfits."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with io.StringIO() as stream:
        train(options(text, folder), stream=stream)
        (folder.parent / "said").write_text(stream.getvalue())
    return folder


def best_of(found: dict[int, float]) -> int:
    return min(found, key=found.__getitem__)


def stop_of(found: dict[int, float]) -> int:
    """Return the step at which so many evaluations in a row were not better, by hand."""
    best, waited = float("inf"), 0
    for step, loss in sorted(found.items()):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == PATIENCE:
            return step
    raise AssertionError("the text is not learned by heart")


def test_a_run_that_overfits_says_so(whole: Path) -> None:
    found = {step: loss for step, loss in scores(whole).items() if step < 40}
    lowest = best_of(found)
    said = (whole.parent / "said").read_text()
    assert f"the model overfits: eval loss {found[lowest]:.3f} at step {lowest} rose to {found[36]:.3f}" in said


def test_the_run_ends_when_the_score_has_not_become_better(whole: Path, text: Path, tmp_path: Path) -> None:
    expected = stop_of({step: loss for step, loss in scores(whole).items() if step < 40})
    assert 8 < expected < 36
    stream = io.StringIO()
    ended = train(options(text, tmp_path / "run", early_stopping_patience=PATIENCE), stream=stream)
    assert ended.steps == results(tmp_path / "run")["steps"] == expected
    assert f"stopped after step {expected} of 40: the evaluation did not become better" in stream.getvalue()
    # It is a finished run: nothing is left to do.
    stream = io.StringIO()
    resumed = options(text, tmp_path / "run", early_stopping_patience=PATIENCE, resume=True)
    assert train(resumed, stream=stream).steps == expected
    assert "is complete" in stream.getvalue()
    assert verify_run(tmp_path / "run").problems == []


def test_an_interrupted_run_stops_at_the_same_step(text: Path, tmp_path: Path) -> None:
    chosen = {"early_stopping_patience": PATIENCE, "load_best_model_at_end": True, "save_total_limit": 9}
    train(options(text, tmp_path / "whole", **chosen), stream=None)
    ended = results(tmp_path / "whole")["steps"]
    for left in (4, ended - 4, ended):  # killed after this checkpoint was written
        cut = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"cut-{left}"))
        for checkpoint in (cut / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > left:
                shutil.rmtree(checkpoint)
        record = json.loads((cut / "run.json").read_text())
        del record["results"]
        (cut / "run.json").write_text(json.dumps({**record, "steps": 40}))
        (cut / "config.json").unlink()
        train(options(text, cut, resume=True, **chosen), stream=None)
        assert updates(cut) == updates(tmp_path / "whole")
        assert results(cut) == results(tmp_path / "whole")


@pytest.mark.parametrize("metric", ["loss", "bits_per_byte"])
def test_the_best_checkpoint_is_published(metric: str, whole: Path, text: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    # Saved where it is the best, too, not only at every 20th step.
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": metric, "save_total_limit": 1, "save_steps": 20}
    ended = train(options(text, tmp_path / "run", **chosen), stream=stream)
    best = best_of({step: loss for step, loss in scores(whole).items() if step < 40})
    assert (ended.steps, results(tmp_path / "run")["published_step"]) == (40, best)
    assert f"step-{best:08d}, eval {metric.replace('_', ' ')}" in stream.getvalue()
    assert "in the run: the published model" in stream.getvalue()
    # A run of only so many steps has the same weights and the same score on all of the text.
    train(options(text, tmp_path / "short", max_steps=best), stream=None)
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "short")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert results(tmp_path / "run")["loss"] == results(tmp_path / "short")["loss"]
    assert verify_run(tmp_path / "run").problems == []


def test_a_higher_threshold_stops_earlier(text: Path, tmp_path: Path) -> None:
    chosen = {"early_stopping_patience": 1, "early_stopping_threshold": 5.0}
    assert train(options(text, tmp_path / "run", **chosen), stream=None).steps == 8  # the second is not 5 nats better
    with pytest.raises(UsageError, match=r"early_stopping_threshold=5\.0 needs early_stopping_patience"):
        options(text, tmp_path / "run", early_stopping_threshold=5.0)


def test_a_threshold_does_not_choose_what_is_published(whole: Path, text: Path, tmp_path: Path) -> None:
    chosen = {"early_stopping_patience": 40, "early_stopping_threshold": 5.0, "save_steps": 20, "save_total_limit": 1}
    train(options(text, tmp_path / "run", load_best_model_at_end=True, **chosen), stream=None)
    best = best_of({step: loss for step, loss in scores(whole).items() if step < 40})
    assert best % 20
    assert results(tmp_path / "run")["published_step"] == best


def test_intervals_are_shares_of_the_steps() -> None:
    def intervals(total: int, **given: Any) -> tuple[int, ...]:
        found = TrainingOptions(output_dir="x", **given).intervals(total)
        return found.evaluation, found.saving, found.logging, found.sample

    assert intervals(20) == (10, 10, 10, 10)
    assert intervals(1500) == (75, 150, 30, 300)
    assert intervals(1_000_000) == (250, 500, 50, 500)
    assert intervals(178) == (10, 17, 10, 35)
    # A checkpoint that is compared is evaluated: just once.
    assert intervals(178, load_best_model_at_end=True) == (10, 20, 10, 35)
    assert intervals(713, eval_steps=0.05, save_steps=0.1, keep_best=2)[:2] == (36, 71 + 1)
    assert intervals(713, eval_steps=0.05, save_steps=0.1)[:2] == (36, 71)
    assert intervals(10_000, eval_steps=0.5, save_steps=0.01, keep_best=2)[:2] == (5000, 100)
    assert intervals(713, eval_steps=0.05, save_steps=71, keep_best=2)[:2] == (36, 71)
    given = {"eval_steps": 0.25, "save_steps": 7, "logging_steps": 0.001, "sample_steps": 0}
    assert intervals(100, **given) == (25, 7, 1, 0)
    with pytest.raises(UsageError, match=r"eval_steps=2\.5 must be a whole number of steps, or a fraction"):
        TrainingOptions(output_dir="x", eval_steps=2.5)


def test_a_run_that_is_made_longer_compares_evaluations_of_its_steps_only(text: Path, tmp_path: Path) -> None:
    """The score of the model that was published is on all held-out text: it is no evaluation of its step."""
    chosen: dict[str, Any] = {"max_eval_samples": 2, "save_total_limit": 99, "load_best_model_at_end": True}
    train(options(text, tmp_path / "whole", **chosen), stream=None)
    train(options(text, tmp_path / "run", **chosen, max_steps=12), stream=None)
    longer = options(text, tmp_path / "run", **chosen, resume=True, allow_changes=["max_steps"])
    train(longer, stream=None)

    def on_a_part(folder: Path) -> list[tuple[int, float]]:
        found = [line for line in updates(folder) if line["kind"] == "eval" and "last" not in line]
        return [(line["step"], line["loss"]) for line in found]

    assert on_a_part(tmp_path / "run") == on_a_part(tmp_path / "whole")
    assert results(tmp_path / "run")["published_step"] == results(tmp_path / "whole")["published_step"]
