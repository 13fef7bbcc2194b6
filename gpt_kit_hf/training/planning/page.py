"""What a plan says: a page of lines for people, and the file for `gpt-kit train --config`."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.planning import Budget
from gpt_kit_hf.storage.atomic_files import replace_file
from gpt_kit_hf.text import duration, short
from gpt_kit_hf.training.planning.law import DEVIATION, MEASURED
from gpt_kit_hf.training.planning.plan import Plan
from gpt_kit_hf.training.runtime.available_memory import available_memory


def page_lines(plan: Plan, budget: Budget) -> list[str]:
    """Return the plan in lines, for a person who has not seen one before."""
    facts, shape, values = plan.facts, plan.candidate, plan.values
    low, high = (plan.bits_per_byte * math.exp(sign * 2 * DEVIATION) for sign in (-1, 1))
    twice_budget, twice_text = plan.twice
    dropout, optimizer = values["dropout"], values.get("optimizer", "adamw")
    decay, free = values.get("weight_decay", 0.1), _bytes(available_memory())
    rates = [f"{values.get('learning_rate', 1e-3):g}"]
    if optimizer == "muon":
        rates = [f"{values['muon_learning_rate']:g} for the matrices of the blocks", f"{rates[0]} for the rest"]
    lines = [
        f"text     {facts.documents:,} document{'s' * (facts.documents != 1)}, {short(facts.text_bytes)} bytes, "
        f"{short(facts.tokens)} training tokens ({plan.encoding.name}, vocabulary of {plan.encoding.n_vocab:,}), "
        f"{facts.repeated:.0%} of it in lines that stand in it before",
        f"shape    {shape.layers} layer{'s' * (shape.layers > 1)} of {shape.width} with {shape.heads} "
        f"head{'s' * (shape.heads > 1)}, {short(shape.parameters)} parameters"
        + (f"; the best of {plan.timed} that were timed" if plan.timed > 1 else ""),
        f"length   {plan.steps:,} steps of {plan.batch_size} x {plan.context} tokens: {plan.epochs:.2f} epochs",
        f"rates    {optimizer}, {' and '.join(rates)}; weight decay {decay:g}, dropout {dropout:g}",
        f"needs    about {duration(plan.seconds)}, {_bytes(plan.memory_bytes)} of memory ({free} free now), "
        f"{_bytes(plan.disk_bytes)} of disk",
        f"expected {plan.bits_per_byte:.2f} bits per byte of the held-out text, between {low:.2f} and {high:.2f}; "
        f"gzip -9 reaches {facts.gzip:.2f}",
        f"         twice the budget would bring {twice_budget:.2f}, twice the text {twice_text:.2f}",
    ]
    seen = plan.steps * plan.candidate_tokens * facts.bytes_per_token
    if not MEASURED.holds(shape.layer_parameters, seen):
        lines.append(f"note     {MEASURED.told()}: beyond that the expectation is a guess")
    return [*lines, *(f"note     {note}" for note in plan.notes)]


def write_plan(plan: Plan, file: Path, budget: str) -> None:
    """Write the options of a plan as YAML. Raises UsageError if the file exists and holds anything else."""
    import yaml

    head = f"# A plan for {budget} by gpt-kit plan: gpt-kit train --config {shlex.quote(str(file))}\n"
    text = head + yaml.safe_dump(plan.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UsageError(f"plan_file {str(file)!r} exists, and is not replaced: name another file by --plan_file")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
