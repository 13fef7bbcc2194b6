"""The recipe by the length of a run and its text: its limits, what a run has of it, and what stays on resuming."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import killed_copy

from gpt_kit_hf import RunOptions, train
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.parser import build_options
from gpt_kit_hf.training.planning import recipe

BY_LENGTH = ("learning_rate", "muon_momentum", "weight_decay", "ema_decay")
FEW, MANY = 60, 90  # steps: the text is read 6.8 and 10.2 times


@pytest.mark.parametrize(
    ("steps", "step_tokens", "rate", "momentum"),
    [(1599, 2048, 0.04, 0.85), (1600, 2048, 0.02, 0.95), (1600, 2047, 0.04, 0.85), (1600, 16_384, 0.02, 0.95)],
)
def test_a_long_run_of_large_steps_has_more_momentum_and_half_of_the_rate(
    steps: int, step_tokens: int, rate: float, momentum: float
) -> None:
    found = recipe.recipe_for(
        steps, step_tokens=step_tokens, text_tokens=10**9, layer_parameters=10**6, vocab_size=4096
    )
    assert (found["learning_rate"], found["muon_momentum"]) == (rate, momentum)
    assert (found["weight_decay"], found["ema_decay"], found["optimizer"]) == (0.1, None, "muon")


@pytest.mark.parametrize(
    ("epochs", "parameters_per_token", "weight_decay", "ema_decay"),
    [
        (2.99, 1.0, 0.1, None),
        (3.0, 1.0, 1.0, None),
        (3.99, 7.0, 1.0, None),
        (4.0, 1.0, 1.0, 0.98),
        (4.0, 0.99, 0.1, None),
        (30.0, 0.5, 0.1, None),
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
    """A text of 704 letters, of which 563 are to train on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    file.write_text("".join(chr(97 + int(each)) for each in torch.randint(12, (704,), generator=generator)))
    return file


def options(text: Path, folder: Path, steps: int, **more: Any) -> RunOptions:
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


def test_a_run_has_the_recipe_for_its_text_and_says_so(text: Path, tmp_path: Path) -> None:
    found, said = begun(options(text, tmp_path / "run", MANY))
    expected = recipe.recipe_for(MANY, step_tokens=64, text_tokens=563, layer_parameters=12 * 32**2, vocab_size=258)
    assert found == {name: expected[name] for name in BY_LENGTH}
    assert (found["weight_decay"], found["ema_decay"]) == (1.0, 0.9111)
    assert said == ["recipe   for 90 steps, 10.2 passes over the text: weight_decay 1.0, ema_decay 0.9111"]


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


def test_a_run_that_was_killed_ends_with_the_same_weights(text: Path, tmp_path: Path) -> None:
    whole = train(options(text, tmp_path / "whole", MANY), stream=None).folder
    killed = killed_copy(whole, tmp_path / "killed", f"step-{MANY:08d}", "step-00000080")
    train(options(text, killed, MANY, resume=True), stream=None)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_that_is_resumed_for_more_steps_keeps_what_it_began_with(text: Path, tmp_path: Path) -> None:
    assert begun(options(text, tmp_path / "run", 20))[0]["weight_decay"] == 0.1
    longer = {"resume": True, "allow_changes": ["max_steps"]}
    found, said = begun(options(text, tmp_path / "run", MANY, **longer))
    assert (found["weight_decay"], found["ema_decay"], said) == (0.1, None, [])
    with pytest.raises(UsageError, match=r"weight_decay was 0\.1, is 1\.0.*--allow_changes weight_decay$"):
        train(options(text, tmp_path / "run", MANY, resume=True, weight_decay=1.0), stream=None)


def test_the_rate_is_that_of_the_vocabulary_that_was_made(text: Path, tmp_path: Path) -> None:
    # A vocabulary of 4,096 tokens is asked for, but so short a text has fewer.
    found, said = begun(options(text, tmp_path / "run", 10, encoding="bpe"))
    assert found["learning_rate"] == 0.004
    assert [line.rpartition(": ")[2] for line in said] == ["learning_rate 0.004"]
