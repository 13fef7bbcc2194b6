"""The recipe by the length of a run and its text: its limits, what a run has of it, and what stays on resuming."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import killed_copy

from gpt_kit_hf import RunOptions, train
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.parser import build_options, parse_options
from gpt_kit_hf.options.run import BY_LENGTH, as_begun
from gpt_kit_hf.training.planning import recipe

FEW, MANY = 60, 90  # steps


@pytest.mark.parametrize(
    ("steps", "step_tokens", "rate", "momentum"),
    [(1599, 2048, 0.04, 0.85), (1600, 2048, 0.02, 0.95), (1600, 1535, 0.04, 0.85), (1600, 1536, 0.02, 0.95)],
)
def test_a_long_run_of_large_steps_has_more_momentum_and_half_of_the_rate(
    steps: int, step_tokens: int, rate: float, momentum: float
) -> None:
    found = recipe.recipe_by_length(
        steps, step_tokens=step_tokens, epochs=1.0, parameters_per_token=1.0, vocab_size=4096
    )
    assert found == {"learning_rate": rate, "muon_momentum": momentum, "weight_decay": 0.1, "ema_decay": None}
    assert tuple(found) == BY_LENGTH  # what a resumed run keeps


@pytest.mark.parametrize(
    ("epochs", "parameters_per_token", "weight_decay", "ema_decay"),
    [
        (2.99, 30.0, 0.1, None),
        (3.0, 3.5, 1.0, None),
        (3.99, 7.0, 1.0, None),
        (4.0, 3.5, 1.0, 0.98),
        (4.0, 3.49, 0.1, None),
        (30.0, 1.0, 0.1, None),
    ],
)
def test_weight_decay_and_average_are_for_large_models_and_many_passes(
    epochs: float, parameters_per_token: float, weight_decay: float, ema_decay: float | None
) -> None:
    assert recipe.weight_decay_for(epochs, parameters_per_token) == weight_decay
    assert recipe.ema_decay_for(epochs, parameters_per_token, 400) == ema_decay
    assert recipe.ema_decay_for(epochs, parameters_per_token, 80) is None


# --- in a run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 704 letters, of which four fifths are to train on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    file.write_text("".join(chr(97 + int(each)) for each in torch.randint(12, (704,), generator=generator)))
    return file


def options(text: Path, folder: Path, steps: int | None, **more: Any) -> RunOptions:
    values: dict[str, Any] = {
        "text_files": [str(text)], "eval_fraction": 0.2, "encoding": "bytes", "max_length": 16,
        "max_position_embeddings": 16, "n_layer": 1, "n_head": 2, "n_embd": 32, "batch_size": 4, "max_steps": steps,
        "output_dir": str(folder), "use_cpu": True, "mixed_precision": "no", "report_to": ["none"], "sample_steps": 0,
        "eval_steps": 30, "save_steps": 40, "save_total_limit": 99,
    }  # fmt: skip
    return build_options(RunOptions, values | more)


def begun(options: RunOptions) -> tuple[dict[str, Any], list[str]]:
    """Train; return the options that the recipe sets by the length, and what the run says of them."""
    output = io.StringIO()
    folder = train(options, stream=output).folder
    stored = json.loads((folder / "options.json").read_text())
    said = [line for line in output.getvalue().splitlines() if line.startswith("recipe")]
    return {name: stored[f"optimizer.{name}"] for name in BY_LENGTH}, said


@pytest.mark.parametrize(
    ("steps", "decays", "said"),
    [
        (20, (0.1, None), []),
        (FEW, (1.0, None), ["recipe   for 60 steps, 6.67 epochs, a vocabulary of 258: weight_decay 1.0"]),
        (
            MANY,
            (1.0, 0.9111),
            ["recipe   for 90 steps, 10.00 epochs, a vocabulary of 258: weight_decay 1.0, ema_decay 0.9111"],
        ),
    ],
)
def test_a_run_has_the_recipe_for_its_text_and_says_so(
    steps: int, decays: tuple[float, float | None], said: list[str], text: Path, tmp_path: Path
) -> None:
    found, heard = begun(options(text, tmp_path / "run", steps))
    assert (found["weight_decay"], found["ema_decay"]) == decays
    assert (found["learning_rate"], found["muon_momentum"]) == (0.004, 0.85)
    assert heard == said


def test_a_whole_number_of_epochs_reaches_its_limit(text: Path, tmp_path: Path) -> None:
    # 36 windows: what is left over of the text is not trained on, and batches of 1 are not rounded up.
    found, said = begun(options(text, tmp_path / "run", None, num_train_epochs=3.0, batch_size=1, max_length=16))
    assert (found["weight_decay"], said[0].partition(",")[0]) == (1.0, "recipe   for 108 steps")


def test_overlapping_windows_are_no_passes(text: Path, tmp_path: Path) -> None:
    found, _ = begun(options(text, tmp_path / "run", None, num_train_epochs=2.0, stride=8))
    assert found["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"weight_decay": 0.1, "ema_decay": None}, (0.1, None)),
        ({"recipe": "fast", "weight_decay": 0.3}, (0.3, 0.9111)),
        ({"recipe": "plain"}, (0.1, None)),
        ({"optimizer": "muon"}, (0.1, None)),
        ({"n_embd": 4}, (0.1, None)),
    ],
)
def test_what_is_given_stays(
    given: dict[str, Any], expected: tuple[float, float | None], text: Path, tmp_path: Path
) -> None:
    found, said = begun(options(text, tmp_path / "run", MANY, **given))
    assert (found["weight_decay"], found["ema_decay"]) == expected
    assert len(said) == (expected[1] is not None)


def test_a_stream_has_no_more_than_the_recipe(text: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text.read_text()[::-1])
    stream = {"streaming": True, "eval_fraction": None, "eval_files": [str(held_out)]}
    given = {**options(text, tmp_path / "run", MANY).given, **stream}
    found, said = begun(build_options(RunOptions, {name: value for name, value in given.items() if value is not None}))
    assert (found["weight_decay"], found["ema_decay"], said) == (0.1, None, [])


def test_rate_and_momentum_of_a_long_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_LONG_RUN", 20)
    monkeypatch.setattr(recipe, "_LARGE_STEP", 64)
    found, _ = begun(options(text, tmp_path / "run", 20))
    assert (found["learning_rate"], found["muon_momentum"]) == (0.002, 0.95)
    found, said = begun(options(text, tmp_path / "own", 20, learning_rate=0.003, muon_momentum=0.9))
    assert (found["learning_rate"], found["muon_momentum"], said) == (0.003, 0.9, [])


def test_a_model_that_is_trained_further_has_no_more_than_the_recipe(text: Path, tmp_path: Path) -> None:
    base = train(options(text, tmp_path / "base", 2), stream=None).folder
    more = {"model_name_or_path": str(base), "recipe": "fast", "encoding": None}
    given = {
        name: value
        for name, value in {**options(text, tmp_path / "run", MANY).given, **more}.items()
        if value is not None and name not in ("n_layer", "n_head", "n_embd", "max_position_embeddings")
    }
    found, said = begun(build_options(RunOptions, given))
    assert (found["weight_decay"], found["ema_decay"], said) == (0.1, None, [])


def test_the_rate_is_that_of_the_vocabulary_that_was_made(text: Path, tmp_path: Path) -> None:
    # The default is a vocabulary of 4,096 tokens, but so short a text has fewer.
    found, said = begun(options(text, tmp_path / "run", 10, encoding="bpe"))
    assert found["learning_rate"] == 0.004
    assert [line.rpartition(": ")[2] for line in said] == ["learning_rate 0.004"]


def test_a_file_of_all_options_leaves_the_recipe_to_the_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--text_files={text}", f"--output_dir={tmp_path / 'run'}", "--encoding=bytes", "--print_config"]
    with pytest.raises(SystemExit):
        parse_options(RunOptions, arguments, prog="")
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    read = parse_options(RunOptions, [f"--config={tmp_path / 'all.yaml'}"], prog="")
    assert not read.given.keys() & {*BY_LENGTH}


# --- when it is resumed


def test_a_run_that_was_killed_ends_with_the_same_weights(text: Path, tmp_path: Path) -> None:
    whole = train(options(text, tmp_path / "whole", MANY), stream=None).folder
    steps = [f"step-{step:08d}" for step in (MANY, 80, 40)]
    for name, lost in {"early": steps, "late": steps[:2]}.items():
        killed = killed_copy(whole, tmp_path / name, *lost)
        train(options(text, killed, MANY, resume=True), stream=None)
        first, second = (load_file(folder / "model.safetensors") for folder in (whole, killed))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_options_that_are_replaced_in_a_notebook_resume_the_run(text: Path, tmp_path: Path) -> None:
    first = options(text, tmp_path / "run", MANY)
    assert begun(first)[0]["ema_decay"] == 0.9111
    again = replace(first, training=replace(first.training, resume=True))
    assert begun(again)[0]["ema_decay"] == 0.9111


def test_a_run_that_is_resumed_for_more_steps_keeps_what_it_began_with(text: Path, tmp_path: Path) -> None:
    assert begun(options(text, tmp_path / "run", 20, muon_momentum=0.9))[0]["weight_decay"] == 0.1
    longer = {"resume": True, "allow_changes": ["max_steps"]}
    found, said = begun(options(text, tmp_path / "run", MANY, **longer))
    assert found == {"learning_rate": 0.004, "muon_momentum": 0.9, "weight_decay": 0.1, "ema_decay": None}
    assert said == []
    with pytest.raises(UsageError, match=r"weight_decay was 0\.1, is 1\.0.*--allow_changes weight_decay$"):
        train(options(text, tmp_path / "run", MANY, resume=True, weight_decay=1.0), stream=None)


def test_a_run_of_an_earlier_version_keeps_what_it_stored(text: Path, tmp_path: Path) -> None:
    now = options(text, tmp_path / "run", MANY)
    kept = as_begun(now, {"optimizer.weight_decay": 0.4, "optimizer.optimizer": "muon"})
    assert kept.optimizer == replace(now.optimizer, weight_decay=0.4)
