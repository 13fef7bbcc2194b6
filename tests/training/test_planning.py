"""Plans: budgets, the law, the choice of a shape, the file, and what a run makes of them."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import math
import re
import weakref
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gpt_kit_hf import (
    GPTKitForCausalLM,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    train,
)
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.data.text.corpus import prepare_corpus
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.model.presets import build_config
from gpt_kit_hf.options import files
from gpt_kit_hf.options.parser import parse_options
from gpt_kit_hf.options.planning import Budget, BudgetOptions, parse_budget
from gpt_kit_hf.options.run import PlanOptions, flat_options, given_of
from gpt_kit_hf.tokenization import encodings
from gpt_kit_hf.training.log import trackers
from gpt_kit_hf.training.needs.cost import StepCost
from gpt_kit_hf.training.needs.due import due_in
from gpt_kit_hf.training.planning import candidates, choice, page, plan
from gpt_kit_hf.training.planning.candidates import Candidate, CompiledSeconds, Timing, allowed_shapes
from gpt_kit_hf.training.planning.corpus_facts import corpus_facts
from gpt_kit_hf.training.planning.law import LAW, MEASURED, Law, layer_parameters
from gpt_kit_hf.training.runtime.launch import create_accelerator

MODEL = ("n_layer", "n_head", "n_embd")


def written(file: Path, lines: int) -> Path:
    """Write a text of which a quarter of the lines stand in it twice."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(200)]
    drawn = rng.integers(0, 200, (lines, 8))
    found = [" ".join(words[word] for word in line) for line in drawn]
    file.write_text("\n".join([*found, *found[: lines // 3]]) + "\n")
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("text") / "text.txt", 600)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a megabyte."""
    return written(tmp_path_factory.mktemp("large") / "text.txt", 16_000)


def of_cost(timing: Timing, shape: tuple[int, int, int], batch_size: int, seconds: float, peak: int = 1) -> Candidate:
    """Return a shape whose step takes so much."""
    layers, heads, width = shape
    return Candidate(
        layers=layers, heads=heads, width=width, parameters=timing.parameters(shape), batch_size=batch_size,
        layer_parameters=layer_parameters(layers, width), context=timing.context,
        cost=StepCost(seconds=seconds, peak_bytes=peak, state_bytes=peak // 2),
    )  # fmt: skip


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Steps take what their parameters need at 1e11 operations a second; returned are the shapes that were timed.

    The machine cannot compile blocks.
    """
    timed = []

    def candidate(self: Timing, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        timed.append(shape)
        parameters = self.parameters(shape)
        return of_cost(self, shape, batch_size, 6 * parameters * batch_size * self.context / 1e11, 16 * parameters)

    monkeypatch.setattr(Timing, "candidate", candidate)
    monkeypatch.setattr(Timing, "compiled", lambda self, candidate: None)
    return timed


def options(text: Path, budget: str, *arguments: str) -> RunOptions:
    return parse_options(
        RunOptions,
        [f"--text_files={text}", "--output_dir=run", f"--budget={budget}", "--use_cpu", *arguments],
        prog="",
    )


# --- budgets


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("90s", ("seconds", 90.0)),
        ("20m", ("seconds", 1200.0)),
        ("1.5 h", ("seconds", 5400.0)),
        ("2d", ("seconds", 172800.0)),
        ("2e15flop", ("flop", 2e15)),
        ("300Mtok", ("tokens", 3e8)),
        ("2Btok", ("tokens", 2e9)),
    ],
)
def test_budgets_are_times_operations_or_tokens(written: str, meant: tuple[Any, float]) -> None:
    assert parse_budget(written) == Budget(*meant)


@pytest.mark.parametrize("wrong", ["20", "m", "-3m", "0h", "3 weeks", "1e3", "20M", "nan s", "1e999s", "1e308d", ""])
def test_other_budgets_are_refused_with_the_units_that_there_are(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"budget=.* one of the units s, m, min, h, d, flop, tok"):
        BudgetOptions(budget=wrong)


@pytest.mark.parametrize("wrong", ["1e30h", "1e40flop", "1e12Btok"])
def test_budgets_that_cannot_be_counted_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match=rf"budget='{wrong}' must be at most [0-9.e+]+ (seconds|flop|tokens)"):
        BudgetOptions(budget=wrong)


# --- the text


def test_facts_of_a_text(text: Path) -> None:
    encoding = encodings.with_pad_token(encodings.get_encoding("bytes"))
    corpus = prepare_corpus(TextOptions(text_files=[str(text)], eval_fraction=0.1), encoding, seed=0)
    facts = corpus_facts(corpus)
    trained = bytes(i for i in corpus.train.read(0, len(corpus.train)) if i < 256)
    assert facts.text_bytes == len(trained)
    assert facts.tokens == len(corpus.train)
    assert facts.documents == 1
    seen, repeated, total = set[bytes](), 0, 0
    for line in trained.split(b"\n")[:-1]:
        total += len(line) + 1
        repeated += (len(line) + 1) * (len(line) >= 32 and line in seen)
        seen.add(line)
    assert facts.repeated == repeated / total > 0.1
    held_out = bytes(i for i in corpus.eval.read(0, len(corpus.eval)) if i < 256)
    assert facts.gzip == 8 * len(gzip.compress(held_out)) / len(held_out)

    def near(text: bytes) -> float:
        packer = zlib.compressobj(9, wbits=16 + 10)
        return 8 * len(packer.compress(text) + packer.flush()) / len(text)

    # Little is held out here, and more if half of the text is.
    assert facts.gzip_near == near(trained[:8192]) != near(held_out)
    corpus = prepare_corpus(TextOptions(text_files=[str(text)], eval_fraction=0.5), encoding, seed=0)
    held_out = bytes(i for i in corpus.eval.read(0, len(corpus.eval)) if i < 256)
    assert corpus_facts(corpus).gzip_near == near(held_out)


# --- the law


SOME_LAW = Law(
    gzip_power=0.9, floor=0.2, size=0.1, size_power=0.3, length=0.25, length_power=0.4, repeats=5.0,
)  # fmt: skip


def test_the_law_is_its_formula() -> None:
    once = 3.0**0.9 * (0.2 + 0.1 * 2.0**-0.3 + 0.25 * 0.5**-0.4)
    assert SOME_LAW.bits_per_byte(3.0, parameters=2e6, seen=5e5, text=1e6) == pytest.approx(once)
    worth = 0.5 * (1 + 5.0 * (1 - math.exp(-3 / 5)))  # four passes over 0.5 MB
    assert SOME_LAW.bits_per_byte(3.0, parameters=2e6, seen=2e6, text=5e5) == pytest.approx(
        3.0**0.9 * (0.2 + 0.1 * 2.0**-0.3 + 0.25 * worth**-0.4)
    )


def test_more_new_text_and_more_parameters_for_it_are_better_by_the_law() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        parameters, seen, more = 10 ** rng.uniform([4, 4, 0.01], [9, 10, 1])
        bits = LAW.bits_per_byte(3.0, parameters=parameters, seen=seen, text=seen)
        assert LAW.bits_per_byte(3.0, parameters=more * parameters, seen=seen, text=seen) < bits
        assert LAW.bits_per_byte(3.0, parameters=parameters, seen=more * seen, text=more * seen) < bits
        assert LAW.bits_per_byte(3.0, parameters=parameters, seen=seen, text=more * seen) <= bits


# --- the choice


@pytest.mark.parametrize("unit", ["s", "e11flop", "ktok"])
def test_a_larger_budget_never_promises_less(unit: str, large: Path, instant: list[tuple[int, int, int]]) -> None:
    plans = [plan.make_plan(options(large, f"{amount}{unit}"), print) for amount in (8, 32, 128, 512, 100_000)]
    bits = [each.bits_per_byte for each in plans]
    assert bits == sorted(bits, reverse=True)
    sizes = [each.candidate.layer_parameters for each in plans]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]
    for each in plans:
        assert each.twice[0] <= each.bits_per_byte
        assert each.twice[1] <= each.bits_per_byte
    assert plans[0].twice[0] < 0.999 * plans[0].bits_per_byte
    assert plans[-1].twice[1] < 0.999 * plans[-1].bits_per_byte


@pytest.mark.parametrize("budget", ["30s", "3e12flop"])
def test_no_shape_is_better(budget: str, large: Path, instant: list[tuple[int, int, int]]) -> None:
    """Against all shapes, each by itself."""
    chosen = plan.make_plan(options(large, budget), print)
    # Of larger shapes than these, the budget does not pay for a step and the evaluation.
    alone = [
        plan.make_plan(
            options(large, budget, f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}"), print
        ).bits_per_byte
        for layers, heads, width in candidates.SHAPES[:7]
    ]
    # The batch of the chosen one may be half as large.
    assert chosen.bits_per_byte == pytest.approx(min(alone), rel=2e-3)


@pytest.mark.parametrize(("deeper", "chosen"), [(1.014, (4, 4, 128)), (1.016, (2, 4, 128))])
def test_of_alike_shapes_that_with_more_layers_is_chosen(
    large: Path,
    monkeypatch: pytest.MonkeyPatch,
    instant: list[tuple[int, int, int]],
    deeper: float,
    chosen: tuple[int, int, int],
) -> None:
    """As many layers of more width are not better if they are worse, and no shape is that is not alike."""
    bits = {(2, 2, 64): 1.03, (2, 4, 128): 1.0, (4, 4, 128): deeper, (4, 6, 192): deeper + 0.0005}
    monkeypatch.setattr(choice.Choice, "bits", lambda self, each, times=1.0, text=1.0: bits.get(each.shape, 2.0))
    assert plan.make_plan(options(large, "30s"), print).candidate.shape == chosen


def test_a_shape_that_was_delayed_is_timed_again(
    large: Path, monkeypatch: pytest.MonkeyPatch, instant: list[tuple[int, int, int]]
) -> None:
    timed, lines, at_once = Timing.candidate, list[str](), plan.make_plan(options(large, "2m"), print).candidate
    times = Counter[tuple[int, int, int]]()

    def delayed(self: Timing, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        found = timed(self, shape, batch_size)
        times[shape] += 1
        slower = 1.4 if shape == at_once.shape and times[shape] == 1 else 1.0
        return replace(found, cost=replace(found.cost, seconds=slower * found.cost.seconds))

    monkeypatch.setattr(Timing, "candidate", delayed)
    made = plan.make_plan(options(large, "2m"), lines.append)
    assert made.candidate == at_once
    assert f"timed    {at_once.size} again: {at_once.cost.seconds:.2g} s" in lines


@pytest.mark.parametrize("tokens", [800e3, 3e6, 300e6])
def test_a_number_of_tokens_is_for_a_small_one_of_the_best_models(
    tokens: float, large: Path, instant: list[tuple[int, int, int]]
) -> None:
    made = plan.make_plan(options(large, f"{tokens / 1e3:.0f}ktok"), print)
    seen, text = made.steps * made.candidate.step_tokens, made.facts.tokens
    assert seen == pytest.approx(min(tokens, LAW.most_epochs * text), rel=0.01)
    sizes = [layer_parameters(layers, width) for layers, _, width in candidates.SHAPES]
    bits = [LAW.bits_per_byte(made.facts.gzip_near, parameters=n, seen=seen, text=text) for n in sizes]
    chosen = sizes.index(made.candidate.layer_parameters)
    # The largest that was tried is hardly better, and a smaller one is worse.
    assert bits[chosen] <= 1.015 * bits[made.tried - 1] < bits[chosen - 1]


@pytest.mark.usefixtures("instant")
def test_only_for_muon_the_law_is_certain(large: Path) -> None:
    known, other = (plan.make_plan(options(large, "20s", *each), print) for each in ([], ["--recipe=plain"]))
    assert known.is_known
    assert not other.is_known
    assert ["between" in "".join(page.page_lines(each)) for each in (known, other)] == [True, False]
    assert "by Muon: outside of that the expectation is a guess" in "".join(page.page_lines(other))


@pytest.mark.usefixtures("instant")
def test_an_expectation_does_not_depend_on_how_much_is_held_out(large: Path) -> None:
    much, little = (
        plan.make_plan(options(large, "2e12flop", *each), print) for each in ([], ["--eval_max_tokens=300"])
    )
    assert little.facts.gzip_near == pytest.approx(much.facts.gzip_near, rel=0.03)
    assert little.facts.gzip > 1.2 * much.facts.gzip  # of the held-out text, with nothing before it


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (["--max_length=512"], {"max_position_embeddings": 512}),
        (["--n_head=6"], {"n_head": 6, "n_embd": 60}),  # near 64
        (["--n_head=7"], {"n_head": 7}),
        (["--n_embd=300"], {"n_embd": 300}),
        (["--n_head=6", "--num_key_value_heads=3"], {"n_head": 6, "num_key_value_heads": 3}),
        (["--num_key_value_heads=4"], {"n_head": 4, "num_key_value_heads": 4}),
        (["--n_head=7", "--head_dim=64"], {"n_head": 7, "head_dim": 64}),
    ],
)
def test_a_plan_is_made_around_a_part_of_the_shape(
    given: list[str], shape: dict[str, int], large: Path, instant: list[tuple[int, int, int]]
) -> None:
    made = plan.make_plan(options(large, "20s", *given), print)
    assert shape.items() <= made.values.items()
    config = build_config(made.run.model, vocab_size=258)
    assert config.head_dim % 2 == config.n_head % config.num_key_value_heads == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--n_embd=97"], "no shape of a plan has n_embd=97 and heads of an even width: give n_layer, n_head, n_embd"),
        (
            ["--n_head=6", "--num_key_value_heads=4"],
            "no shape of a plan has n_head=6, num_key_value_heads=4 and heads",
        ),
        (["--max_length=512", "--max_position_embeddings=256"], "max_length=512 is above max_position_embeddings=256"),
        (["--model=modern-xs", "--n_head=7"], "n_embd must be divisible by n_head, got 128 and 7"),
    ],
)
def test_parts_of_a_shape_that_do_not_fit_are_refused(given: list[str], message: str, large: Path) -> None:
    with pytest.raises(UsageError, match=message):
        plan.make_plan(options(large, "20s", *given), print)


def test_runs_of_few_tokens_are_not_what_the_law_holds_for() -> None:
    (fewest, most), (least, longest) = MEASURED.parameters, MEASURED.seen
    assert MEASURED.holds(fewest / 4, least)
    assert MEASURED.holds(4 * most, 4 * longest)
    assert not MEASURED.holds(fewest / 5, least)
    assert not MEASURED.holds(fewest, 0.9 * least)
    assert not MEASURED.holds(fewest, 5 * longest)


def test_a_text_is_not_read_for_ever(text: Path, instant: list[tuple[int, int, int]]) -> None:
    made = plan.make_plan(options(text, "1000d"), print)
    assert made.epochs == pytest.approx(LAW.most_epochs, abs=0.2)
    facts, size = made.facts, made.candidate.layer_parameters
    seen = {passes: passes * facts.tokens for passes in (1, LAW.most_epochs, 1000)}
    once, most, ever = (LAW.bits_per_byte(3.0, parameters=size, seen=n, text=facts.tokens) for n in seen.values())
    assert (most - ever) < 0.02 * (once - ever)
    assert any("shorter than the budget" in note for note in made.notes)
    # Nor is a huge model trained on it.
    assert size < 32 * facts.tokens
    assert any("too small for larger shapes" in note for note in made.notes)


def test_slow_steps_are_not_timed(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the smallest shape takes three seconds: that of larger ones follows from it."""
    timed = []

    def candidate(self: Timing, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        timed.append(shape)
        seconds = 3.0 * self.parameters(shape) / self.parameters(candidates.SHAPES[0])
        return of_cost(self, shape, batch_size, seconds, 1_000_000)

    monkeypatch.setattr(Timing, "candidate", candidate)
    made = plan.make_plan(options(large, "200s", "--batch_size=8"), print)
    assert made.tried >= 2
    assert set(timed) == {candidates.SHAPES[0], made.candidate.shape}
    assert made.candidate.timed
    timed.clear()
    plan.make_plan(options(large, "2h", "--batch_size=8"), print)
    assert len(set(timed)) > 1  # of a larger budget, it is a smaller share


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "0.001s",
            r"budget is too short: a step of 8 x 256 tokens with 2 layers of 64 and the evaluation of \S+ held-out",
        ),
        (
            "1e6flop",
            "the budget is less than a step of 8 x 256 tokens with 2 layers of 64: give more, or a lower batch_size",
        ),
        ("100tok", "the budget is less than a step of 8 x 256 tokens"),
    ],
)
def test_a_budget_without_a_step_is_refused(
    budget: str, message: str, large: Path, instant: list[tuple[int, int, int]]
) -> None:
    with pytest.raises(UsageError, match=message):
        plan.make_plan(options(large, budget), print)


def test_a_shape_without_a_step_is_not_chosen(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape takes ten times as long as the one before: of equally many steps, the larger ones are better."""

    def candidate(self: Timing, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        seconds = 0.5 * 10.0 ** candidates.SHAPES.index(shape) * batch_size / 8
        return of_cost(self, shape, batch_size, seconds, 1_000_000)

    monkeypatch.setattr(Timing, "candidate", candidate)
    made = plan.make_plan(options(large, "20s"), print)
    assert made.candidate.shape == candidates.SHAPES[0]
    assert made.seconds <= 20
    assert made.tried <= 2


def test_twice_is_expected_of_the_batch_that_is_trained(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches take as long as larger ones, so a token takes longer than in the search, for all shapes."""

    def candidate(self: Timing, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        return of_cost(self, shape, batch_size, 0.02 + 0.004 * candidates.SHAPES.index(shape), 1_000_000)

    monkeypatch.setattr(Timing, "candidate", candidate)
    made = plan.make_plan(options(large, "1.6s", "--eval_max_tokens=4096"), print)
    assert made.candidate.batch_size < 8
    seen, chosen = 2 * made.steps * made.candidate.step_tokens, made.candidate.layer_parameters
    once = LAW.bits_per_byte(made.facts.gzip_near, parameters=chosen, seen=seen, text=made.facts.tokens)
    assert 0.97 * once < made.twice[0] < 1.01 * once
    # Not all of the text is read: more of it brings nothing.
    assert made.epochs < 1
    assert made.twice[1] == made.bits_per_byte


@pytest.mark.parametrize("budget", ["20s", "5e11flop", "200ktok"])
def test_a_plan_takes_what_it_may(budget: str, large: Path, instant: list[tuple[int, int, int]]) -> None:
    made, meant = plan.make_plan(options(large, budget), print), parse_budget(budget)
    step = made.candidate.step_tokens
    taken = {
        "seconds": made.seconds,
        "flop": 6 * made.candidate.parameters * made.steps * step,
        "tokens": made.steps * step,
    }[meant.kind]
    assert taken == pytest.approx(meant.amount, rel=0.05)


@pytest.mark.parametrize("evaluating", [["--eval_steps=1"], ["--eval_steps=0.5", "--eval_fraction=0.5"], []])
def test_a_time_is_for_steps_and_evaluations(
    evaluating: list[str], large: Path, instant: list[tuple[int, int, int]]
) -> None:
    """A model so large that an evaluation takes as long as many steps."""
    shape = ("--n_layer=8", "--n_head=8", "--n_embd=512", "--max_eval_samples=100000")
    made = plan.make_plan(options(large, "1000s", *shape, *evaluating), print)
    step, facts = made.candidate.cost.seconds, made.facts
    evaluated = step / made.candidate.step_tokens * facts.eval_tokens / 3
    interval = made.run.training.intervals(made.steps).evaluation
    times = 1 + len([n for n in range(1, made.steps) if n % interval == 0])
    assert made.seconds == pytest.approx(made.steps * step + times * evaluated, rel=1e-6)
    assert 1000 - step - evaluated <= made.seconds <= 1000


def test_what_was_given_stays(text: Path, instant: list[tuple[int, int, int]]) -> None:
    # Also where it is what it would be by default.
    given = ("--n_layer=3", "--batch_size=32", "--max_length=64", "--dropout=0.3", "--weight_decay=0.1", "--seed=5")
    made = plan.make_plan(options(text, "60s", *given), print)
    expected = {
        "n_layer": 3, "batch_size": 32, "max_length": 64, "dropout": 0.3, "weight_decay": 0.1, "seed": 5
    }  # fmt: skip
    assert {name: made.values[name] for name in expected} == expected
    assert {layers for layers, _, _ in instant} == {3}
    assert made.values["max_position_embeddings"] == 64
    own = plan.make_plan(options(text, "60s", "--model=nano-xs", "--optimizer=adamw"), print)
    assert own.values["model"] == "nano-xs"
    assert "muon_learning_rate" not in own.values
    assert (own.candidate.layers, own.candidate.width) == (4, 128)


def test_shapes_have_heads_of_an_even_width() -> None:
    for fixed in ({}, {"n_head": 8}, {"n_embd": 96}, {"n_layer": 1}):
        for shape in allowed_shapes(fixed, (4, 4, 256)):
            assert all(fixed.get(name, value) == value for name, value in zip(MODEL, shape, strict=True))
            assert shape[2] % (2 * shape[1]) == 0
    assert [*allowed_shapes({"model": "nano-xs"}, (4, 4, 128))] == [(4, 4, 128)]
    assert tuple(allowed_shapes({}, (4, 4, 256))) == candidates.SHAPES


@pytest.mark.parametrize(
    "given",
    [{"n_embd": 100}, {"n_embd": 96}, {"n_head": 5}, {"n_head": 3}, {"n_layer": 6}, {"n_head": 6, "head_dim": 20}],
)
def test_what_is_given_of_a_shape_leaves_many_others(given: dict[str, int]) -> None:
    found = [layer_parameters(layers, width) for layers, _, width in allowed_shapes(given, (4, 4, 256))]
    assert len(found) >= 7
    assert all(1 < after / before < 5 for before, after in itertools.pairwise(found))


def test_repeated_text_and_many_passes_are_noted(tmp_path: Path, instant: list[tuple[int, int, int]]) -> None:
    file = tmp_path / "text.txt"
    lines = [f"line {n % 40}, which stands there again and again" for n in range(2000)]
    file.write_text("\n".join(lines))
    made = plan.make_plan(options(file, "600s", "--n_embd=64"), print)
    assert any("in repeated lines" in note for note in made.notes)
    assert any("shorter than the budget" in note for note in made.notes)
    assert (made.values["dropout"], made.values["ema_decay"]) == (0.0, round(1 - 8 / made.steps, 4))
    assert made.values["weight_decay"] == 1.0
    same = plan.make_plan(options(file, "600s", "--n_embd=64", "--recipe=fast", "--optimizer=muon"), print)
    assert made.values.items() <= same.values.items()
    for own in (["--optimizer=adamw"], ["--recipe=plain"]):
        values = plan.make_plan(options(file, "600s", "--n_embd=64", *own), print).values
        assert not {"weight_decay", "ema_decay"} & values.keys()


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take a second."""
    monkeypatch.setattr(Timing, "candidate", lambda self, shape, size: of_cost(self, shape, size, 1.0, peak=1000))


ONE_SHAPE = ("--n_layer=1", "--n_head=1", "--n_embd=16")
ONE_LARGE_SHAPE = ("--n_layer=1", "--n_head=1", "--n_embd=128")  # of six times the parameters of the text's tokens


@pytest.mark.usefixtures("second")
def test_an_average_of_the_weights_is_for_large_models_and_many_passes(text: Path) -> None:
    made = plan.make_plan(options(text, "900s", *ONE_LARGE_SHAPE), print)
    assert made.values["ema_decay"] == pytest.approx(1 - 8 / made.steps, abs=1e-4)
    assert any(
        f"an average of the weights with a decay rate of {made.values['ema_decay']}" in line
        for line in page.page_lines(made)
    )
    without = replace(made, values={**made.values, "ema_decay": None})
    assert made.memory_bytes - without.memory_bytes == 4 * made.candidate.parameters
    assert made.disk_bytes > without.disk_bytes
    own = plan.make_plan(options(text, "900s", *ONE_LARGE_SHAPE, "--ema_decay=0.5", "--weight_decay=0.2"), print)
    assert (own.values["ema_decay"], own.values["weight_decay"]) == (0.5, 0.2)
    none = plan.make_plan(options(text, "900s", *ONE_LARGE_SHAPE, "--ema_decay=none"), print)
    assert none.run.optimizer.ema_decay is None
    small = plan.make_plan(options(text, "900s", *ONE_SHAPE), print)  # of a tenth of the text's tokens
    assert small.values["ema_decay"] is None
    assert small.values["weight_decay"] == 0.1
    assert small.epochs > 5


@pytest.mark.parametrize("delayed", [0, 1])
def test_the_faster_time_of_the_chosen_shape_counts(
    delayed: int, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = [1.0, 1.0]
    took[delayed] = 2.0  # as another program computed
    times = iter(took)
    monkeypatch.setattr(Timing, "candidate", lambda self, shape, size: of_cost(self, shape, size, next(times)))
    made = plan.make_plan(options(large, "200s", *ONE_SHAPE, "--batch_size=8"), print)
    assert made.candidate.cost.seconds == 1.0
    assert next(times, None) is None


def test_what_is_trained_is_timed_twice(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def candidate(self: Timing, shape: tuple[int, int, int], size: int) -> Candidate:
        timed.append(size)
        return of_cost(self, shape, size, 2.0 if timed.count(size) == 1 else 1.0)  # delayed at first

    monkeypatch.setattr(Timing, "candidate", candidate)
    made = plan.make_plan(options(text, "60s", *ONE_SHAPE), print)
    assert timed.count(2) == 2  # a smaller batch for more steps
    assert timed[0] > 2
    assert made.candidate.cost.seconds == 1.0


def test_a_step_that_takes_long_is_timed_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr(
        Timing, "candidate", lambda self, shape, size: timed.append(size) or of_cost(self, shape, size, 5.0)
    )
    plan.make_plan(options(text, "200s", *ONE_SHAPE, "--batch_size=8"), print)
    assert timed == [8]


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize(("budget", "momentum", "rate"), [("1590s", 0.85, 4e-3), ("1610s", 0.95, 2e-3)])
def test_many_steps_have_more_momentum_and_half_of_the_rate(
    budget: str, momentum: float, rate: float, large: Path
) -> None:
    few_evaluations = ("--eval_max_tokens=512", "--batch_size=32", "--max_length=64", "--eval_steps=100000")
    arguments = [budget, *ONE_SHAPE, *few_evaluations]
    made = plan.make_plan(options(large, *arguments), print)
    assert (made.steps >= 1600) == (momentum == 0.95)
    assert (made.values["muon_momentum"], made.values["learning_rate"]) == (momentum, rate)
    own = plan.make_plan(options(large, *arguments, "--muon_momentum=0.5", "--learning_rate=0.003"), print)
    assert (own.values["muon_momentum"], own.values["learning_rate"]) == (0.5, 0.003)


@pytest.mark.usefixtures("second")
def test_the_evaluations_of_the_best_checkpoints_are_counted(text: Path) -> None:
    made = plan.make_plan(options(text, "900s", *ONE_LARGE_SHAPE, "--save_steps=3", "--eval_steps=7"), print)
    assert made.values["load_best_model_at_end"]
    run = made.run.training
    due = due_in(run, made.steps, eval_before_training=False)
    evaluations = sum(map(due.evaluation, range(1, made.steps)))
    assert evaluations > made.steps / 4
    evaluated = made.facts.eval_tokens / made.candidate.step_tokens * made.candidate.cost.seconds / 3
    assert made.seconds == pytest.approx(made.steps + (evaluations + 1) * evaluated, rel=1e-6)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize(
    ("compiled", "given", "chosen"),
    [
        (CompiledSeconds(uncompiled=1.0, first=20.0, compiled=0.6), [], True),
        (CompiledSeconds(uncompiled=1.0, first=20.0, compiled=0.97), [], None),
        (CompiledSeconds(uncompiled=1.0, first=300.0, compiled=0.6), [], None),
        (None, [], None),  # the machine has no compiler
        (CompiledSeconds(uncompiled=1.0, first=20.0, compiled=0.6), ["--torch_compile=false"], False),
        (CompiledSeconds(uncompiled=1.0, first=20.0, compiled=1.2), ["--torch_compile"], True),
    ],
)
def test_blocks_are_compiled_where_that_saves_time(
    compiled: CompiledSeconds | None,
    given: list[str],
    chosen: bool | None,
    large: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Candidate] = []
    monkeypatch.setattr(Timing, "compiled", lambda self, candidate: asked.append(candidate) or compiled)
    made = plan.make_plan(options(large, "600s", *ONE_SHAPE, *given), print)
    assert made.values.get("torch_compile") is chosen
    assert made.candidate.cost.seconds == (compiled.compiled if chosen and compiled is not None else 1.0)
    assert made.seconds == pytest.approx(600, rel=0.02)
    assert len(asked) == (chosen is not False)
    asked.clear()
    plan.make_plan(options(large, "30s", *ONE_SHAPE), print)  # too short to try it
    assert not asked


@pytest.mark.slow  # torch's compiler takes half a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch itself
def test_compiled_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    timing = Timing(
        model=ModelOptions(model="modern-xs", max_position_embeddings=32), optimizer=OptimizerOptions(),
        accelerator=create_accelerator(use_cpu=True), mixed_precision="fp32", vocab_size=50, context=32,
    )  # fmt: skip
    candidate = timing.candidate((1, 2, 32), 4)
    assert torch._dynamo.utils.counters["frames"]["ok"] == 0
    found = timing.compiled(candidate)
    assert found is not None
    assert torch._dynamo.utils.counters["frames"]["ok"] > 1  # one is the test of the compiler
    assert found.first > 3 * found.compiled
    monkeypatch.setattr(candidates, "compile_blocks", lambda *_, **__: False)
    assert timing.compiled(candidate) is None


def test_shapes_that_do_not_fit_into_the_memory_are_left_out(
    large: Path, instant: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "memory_left", lambda device: 36e6 + 25 * (layer_parameters(4, 128) + 300 * 128))
    made = plan.make_plan(options(large, "10h"), print)
    assert made.candidate.width <= 128
    assert any("do not fit into the memory" in note for note in made.notes)
    assert {width for _, _, width in instant} == {64, 128}  # what would not fit is not tried
    monkeypatch.setattr(choice, "memory_left", lambda device: 1000)
    with pytest.raises(UsageError, match="no shape fits into the memory"):
        plan.make_plan(options(large, "10h"), print)


def test_a_device_without_enough_memory_ends_the_search(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Timing.candidate

    def candidate(self: Timing, shape: tuple[int, int, int], batch_size: int) -> Candidate:
        if shape[2] > 64:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, shape, batch_size)

    monkeypatch.setattr(Timing, "candidate", candidate)
    made = plan.make_plan(options(large, "10h", "--batch_size=1", "--max_length=32"), print)
    assert made.candidate.width == 64
    assert any("2 x 128 and larger shapes do not fit" in note for note in made.notes)


@pytest.mark.parametrize("content", ["x", "hello world\n", "a text of a hundred characters or so " * 3])
def test_a_text_without_a_window_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(content)
    command = ["plan", "--text_files", str(tmp_path / "text.txt"), "--budget", "5s", "--use_cpu"]
    assert main([*command, "--plan_file", str(tmp_path / "plan.yaml")]) == 2
    assert "too few for a model" in capsys.readouterr().err
    assert not (tmp_path / "plan.yaml").exists()


def test_rows_that_repeat_are_counted(tmp_path: Path) -> None:
    rows = [f"row {n % 50} of a file of rows, long enough to count" for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    encoding = encodings.with_pad_token(encodings.get_encoding("bytes"))
    read = prepare_corpus(TextOptions(text_files=[str(tmp_path / "rows.jsonl")], eval_fraction=0.1), encoding, seed=0)
    assert corpus_facts(read).repeated == pytest.approx((180 - 50) / 180, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_steps=5"], "budget='9s' and max_steps=5: both say how long the run is"),
        (["--num_train_epochs=2"], "budget='9s' and num_train_epochs=2.0: both say"),
        (["--streaming", "--eval_files=TEXT"], "budget='9s' needs a stored text"),
        (["--model_name_or_path=somewhere"], "budget='9s' plans a new model"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str, text: Path) -> None:
    with pytest.raises(UsageError, match=message):
        plan.make_plan(options(text, "9s", *(each.replace("TEXT", str(text)) for each in arguments)), print)


def test_several_processes_need_a_file(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="write a plan with gpt-kit plan, and launch it by --config"):
        plan.make_plan(options(text, "9s"), print)


# --- the file and the run


def test_the_file_of_a_plan_is_what_train_takes(
    text: Path, instant: list[tuple[int, int, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "plans" / "mine.yaml", tmp_path / "run"
    command = ["plan", "--text_files", str(text), "--budget", "30s", "--plan_file", str(file), "--use_cpu"]
    assert main([*command, "--output_dir", str(run), "--eval_fraction", "0.1"]) == 0
    said = capsys.readouterr().out
    for begin in ("text ", "shape ", "length ", "rates ", "needs ", "expected ", "next "):
        assert f"\n{begin}" in said
    values = yaml.safe_load(file.read_text())
    assert f"{values['max_steps']:,} steps of {values['batch_size']} x {values['max_length']} tokens" in said
    planned = parse_options(RunOptions, ["--config", str(file)], prog="")
    assert planned.training.max_steps == values["max_steps"]
    assert planned.text.eval_fraction == 0.1
    assert planned.optimizer.optimizer == "muon"
    assert planned.plan.budget is None
    # The same plan again is no other file, another one is not written over it.
    assert main([*command, "--output_dir", str(run), "--eval_fraction", "0.1"]) == 0
    assert main([*command, "--output_dir", str(run), "--eval_fraction", "0.2"]) == 2
    ended = capsys.readouterr()
    assert f"plan_file '{file}' exists, and is not replaced" in ended.err
    assert f"note     {file} exists: another plan is not written over it" in ended.out
    assert yaml.safe_load(file.read_text()) == values
    file.write_bytes("Übung".encode("latin-1"))
    assert main([*command, "--output_dir", str(run)]) == 2
    assert file.read_bytes() == "Übung".encode("latin-1")


@pytest.mark.parametrize(("name", "reason"), [(".", "is a folder"), ("text.txt/plan.yaml", "cannot be written in ")])
def test_a_plan_that_cannot_be_written_is_not_made(
    name: str, reason: str, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_planned", lambda *_: pytest.fail("it is made"))
    command = ["plan", "--text_files", str(text), "--budget", "30s", "--use_cpu", "--plan_file"]
    assert main([*command, str(text.parent / name)]) == 2
    assert reason in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(
    text: Path,
    instant: list[tuple[int, int, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page, "replace_file", full)
    file = tmp_path / "plan.yaml"
    assert main(["plan", f"--text_files={text}", "--budget=30s", "--use_cpu", f"--plan_file={file}"]) == 2
    assert f"plan_file '{file}' cannot be written: No space left on device" in capsys.readouterr().err


def test_what_plan_says_to_do_next_can_be_done(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no option but the text and the budget, as a newcomer calls it."""
    monkeypatch.chdir(tmp_path)
    small = ["--n_embd=16", "--n_head=2", "--n_layer=1", "--max_length=32", "--optimizer=muon", "--batch_size=16"]
    assert main(["plan", f"--text_files={text}", "--budget=2ktok", "--use_cpu", *small]) == 0
    said = capsys.readouterr().out
    assert "muon, 0.001 for the matrices of the layers, 0.001 for the rest" in said
    assert re.search(r"expected [\d.]+ bits per byte of the held-out text; gzip", said)  # of 2,000 tokens: no range
    assert "outside of that the expectation is a guess" in said
    following = said.splitlines()[-1].removeprefix("next     gpt-kit ").split()
    assert main(following) == 0
    monkeypatch.setattr(files, "STANDARD_INPUT", text)
    assert main(["plan", "--text_files", "-", "--budget=2ktok", "--use_cpu", "--plan_file=piped.yaml", *small]) == 0
    piped = capsys.readouterr().out.splitlines()[-1]
    assert piped == "next     gpt-kit train --config piped.yaml, with the same text piped into it"
    record = json.loads((tmp_path / "runs/planned/options.json").read_text())
    assert record["training.max_steps"] == yaml.safe_load(Path("plan.yaml").read_text())["max_steps"]


def test_train_plans_and_a_resumed_run_keeps_its_plan(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are really timed; the budget is in tokens, so that the plan does not depend on the machine's load."""
    run = tmp_path / "run"
    command = ["train", "--text_files", str(text), "--budget", "20ktok", "--use_cpu", "--output_dir", str(run)]
    command += ["--n_embd=16", "--n_head=2", "--n_layer=1", "--report_to=none", "--max_length=32", "--sample_steps=0"]
    command += ["--batch_size=16", "--max_eval_samples=4"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "timed    1 layer of 16: " in said
    assert disk_said(said)
    record = json.loads((run / "options.json").read_text())
    assert record["plan.budget"] == "20ktok"
    assert record["training.max_steps"] * record["training.batch_size"] * 32 == pytest.approx(20_000, rel=0.05)
    assert f"training {record['training.max_steps']:,} steps of" in said

    def refuse(*_: Any) -> None:
        raise AssertionError("it is planned again")

    monkeypatch.setattr(page, "make_plan", refuse)
    assert main([*command, "--resume"]) == 0
    assert "is complete" in capsys.readouterr().out
    parsed = parse_options(RunOptions, command[1:], prog="")
    again = train(replace(parsed, training=replace(parsed.training, resume=True)), stream=None)
    assert again.steps == record["training.max_steps"]
    assert main([*command, "--resume", "--budget=40ktok"]) == 0
    assert "the run was begun planned for 20ktok, and goes on so" in capsys.readouterr().out
    without = [each for each in command if each not in ("--budget", "20ktok")]
    assert main([*without, "--resume"]) == 2
    assert "give them as they were, or for its plan give --budget 20ktok, or name" in capsys.readouterr().err
    # A run that is not complete writes its options again: those of the plan that was made.
    found = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({name: value for name, value in found.items() if name != "results"}))
    (run / "config.json").unlink()
    assert main([*command, "--resume", "--budget=40ktok"]) == 0
    assert "is complete" not in capsys.readouterr().out
    assert json.loads((run / "options.json").read_text()) == {**record, "training.resume": True}


def test_a_tracker_that_is_not_installed_is_refused_before_the_plan(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    lines = list[str]()
    with pytest.raises(UsageError, match="report_to 'wandb' is not installed"):
        page.planned_options(options(text, "20ktok", "--report_to=wandb"), lines.append)
    assert not lines


def disk_said(said: str) -> str:
    """Return the disk that a plan and its run name, which is the same."""
    of_plan, of_run = re.findall(r" ([^ ]+ .?B) of disk", said)
    assert of_plan == of_run
    return str(of_run)


def test_the_disk_of_an_average_and_of_the_best_checkpoints_is_planned(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--text_files", str(text), "--budget", "20ktok", "--use_cpu"]
    command += ["--n_embd=16", "--n_head=2", "--n_layer=1", "--report_to=none", "--max_length=32", "--sample_steps=0"]
    command += ["--batch_size=16", "--max_eval_samples=4", "--save_steps=10", "--eval_steps=10"]
    assert main([*command, f"--output_dir={tmp_path / 'plain'}"]) == 0
    plain = capsys.readouterr().out
    assert main([*command, f"--output_dir={tmp_path / 'more'}", "--ema_decay=0.9", "--load_best_model_at_end"]) == 0
    more = capsys.readouterr().out
    assert disk_said(plain) != disk_said(more)


def test_what_was_given_is_no_option_of_the_run(text: Path) -> None:
    made = options(text, "9s")
    assert made.given["budget"] == "9s"
    assert not [name for name in flat_options(made) if name.startswith("given")]
    assert made == replace(made)
    assert replace(made).given == made.given


def test_what_is_replaced_in_options_counts_as_given(text: Path) -> None:
    made = options(text, "9s", "--seed=2")
    assert given_of(made) == made.given
    other = replace(made, training=replace(made.training, seed=3, output_dir="other"))
    assert given_of(other) == {**made.given, "seed": 3, "output_dir": "other"}
    built = RunOptions(training=TrainingOptions(output_dir="run", seed=5), text=TextOptions(text_files=[str(text)]))
    assert given_of(built) == {"output_dir": "run", "seed": 5, "text_files": [str(text)], "max_length": 256}


def test_plan_needs_no_output_dir(text: Path) -> None:
    made = parse_options(PlanOptions, [f"--text_files={text}", "--budget=9s"], prog="")
    assert made.training.output_dir == "runs/planned"
    with pytest.raises(UsageError, match="budget is missing"):
        parse_options(PlanOptions, [f"--text_files={text}"], prog="")


def test_a_run_without_a_command_line_is_planned(
    text: Path, instant: list[tuple[int, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    made = RunOptions(
        training=TrainingOptions(output_dir="run", use_cpu=True),
        text=TextOptions(text_files=[str(text)]),
        plan=BudgetOptions(budget="10s"),
    )
    planned = page.planned_options(made, lambda line: None)
    assert planned.training.max_steps is not None
    assert planned.text == made.text
    assert planned.training.use_cpu


def test_shapes_that_were_timed_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = list[weakref.ref[GPTKitForCausalLM]](), GPTKitForCausalLM.__init__

    def noted(self: GPTKitForCausalLM, *args: Any, **kwargs: Any) -> None:
        made.append(weakref.ref(self))
        init(self, *args, **kwargs)

    monkeypatch.setattr(GPTKitForCausalLM, "__init__", noted)
    timing = Timing(
        model=ModelOptions(model="modern-xs"), optimizer=OptimizerOptions(optimizer="muon"),
        accelerator=create_accelerator(use_cpu=True), mixed_precision="fp32", vocab_size=37, context=16,
    )  # fmt: skip
    for width in (16, 32, 48):
        timing.candidate((1, 2, width), 2)
    assert [model() for model in made] == [None] * len(made)
    assert len(made) >= 3
