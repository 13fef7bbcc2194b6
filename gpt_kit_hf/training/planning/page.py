"""What a plan says: a page of lines for people, and the file for `gpt-kit train --config`."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.storage.atomic_files import replace_file
from gpt_kit_hf.text import duration, file_size, short
from gpt_kit_hf.training.planning.law import DEVIATION, MEASURED
from gpt_kit_hf.training.planning.plan import Plan
from gpt_kit_hf.training.runtime.available_memory import available_memory


def page_lines(plan: Plan) -> list[str]:
    """Return the plan in lines, for a person who has not seen one before."""
    facts, chosen, run = plan.facts, plan.candidate, plan.run
    low, high = (plan.bits_per_byte * math.exp(sign * 2 * DEVIATION) for sign in (-1, 1))
    twice_budget, twice_text = plan.twice
    rates = f"{run.optimizer.learning_rate:g}"
    if run.optimizer.optimizer == "muon":
        of_matrices = run.optimizer.muon_learning_rate or run.optimizer.learning_rate
        rates = f"{of_matrices:g} for the matrices of the layers, {rates} for the rest"
    lines = [
        f"text     {facts.documents:,} document{'s' * (facts.documents != 1)}; to train on {short(facts.text_bytes)} "
        f"bytes, {short(facts.tokens)} tokens ({plan.encoding.name}, vocabulary of {plan.encoding.n_vocab:,}); "
        f"{facts.repeated:.0%} are in repeated lines",
        f"shape    {chosen.layers} layer{'s' * (chosen.layers > 1)} of {chosen.width} with {chosen.heads} "
        f"head{'s' * (chosen.heads > 1)}, {short(chosen.parameters)} parameters"
        + (f"; the best of {plan.tried} shapes" if plan.tried > 1 else ""),
        f"length   {plan.steps:,} steps of {chosen.batch_size} x {chosen.context} tokens: the text is read "
        f"{plan.epochs:.2g} times",
        f"rates    {run.optimizer.optimizer}, {rates}; weight decay {run.optimizer.weight_decay:g}, dropout "
        f"{run.model.dropout or 0:g}",
        f"needs    about {duration(plan.seconds)}, {file_size(plan.memory_bytes)} of memory "
        f"({file_size(available_memory())} are free), {file_size(plan.disk_bytes)} of disk",
        f"expected {plan.bits_per_byte:.2f} bits per byte of the held-out text, between {low:.2f} and {high:.2f}; "
        f"gzip -9 reaches {facts.gzip:.2f}",
        f"expected with twice the budget {twice_budget:.2f}, with twice the text {twice_text:.2f}",
    ]
    if not MEASURED.holds(chosen.layer_parameters, plan.steps * chosen.step_tokens):
        lines.append(f"note     {MEASURED.told()}: outside of that the expectation is a guess")
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
