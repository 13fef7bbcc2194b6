"""What is made of a plan: lines for people, the file for `gpt-kit train --config`, and the options of a run."""

from __future__ import annotations

import math
import os
import shlex
from collections import ChainMap
from pathlib import Path

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.declare import sections_of
from gpt_kit_hf.options.parser import build_options
from gpt_kit_hf.options.run import RunOptions, given_of, stored_options
from gpt_kit_hf.storage.atomic_files import Report, load_json, replace_file
from gpt_kit_hf.storage.run_folder import OPTIONS_FILE, holds_run
from gpt_kit_hf.text import duration, file_size, short
from gpt_kit_hf.training.log.trackers import chosen_trackers
from gpt_kit_hf.training.planning.law import DEVIATION, MEASURED
from gpt_kit_hf.training.planning.plan import Plan, make_plan
from gpt_kit_hf.training.runtime.available_memory import available_memory

_KNOWS_NOTHING = 8.0  # bits per byte of a model that knows nothing of a text: more cannot be


def planned_options(options: RunOptions, log: Report) -> RunOptions:
    """Return the options of a run with a budget: planned, or those of the run that is resumed; `log` gets the plan.

    Raises UsageError for a budget that cannot be planned, see `make_plan`, and for a tracker that is not installed.
    """
    assert options.plan.budget is not None
    folder = Path(options.training.output_dir)
    if options.training.resume and holds_run(folder):
        stored = stored_options(RunOptions, load_json(folder / OPTIONS_FILE))
        kept = [vars(getattr(stored, section)) for section in sections_of(RunOptions)]
        if stored.plan.budget != options.plan.budget:
            planned = "without a plan" if stored.plan.budget is None else f"planned for {stored.plan.budget}"
            log(f"note     the run was begun {planned}, and goes on so: a run is not planned again")
        return build_options(RunOptions, {**dict(ChainMap(*kept)), **given_of(options), "budget": stored.plan.budget})
    chosen_trackers(options.training.report_to)  # refused now, as the run is made here
    plan = make_plan(options, log)
    for line in page_lines(plan):
        log(line)
    return build_options(RunOptions, {**plan.values, "budget": options.plan.budget})


def page_lines(plan: Plan) -> list[str]:
    """Return the plan in lines, for a person who has not seen one before."""
    facts, chosen, run = plan.facts, plan.candidate, plan.run
    low, high = (plan.bits_per_byte * math.exp(sign * 2 * DEVIATION) for sign in (-1, 1))
    expected, low, high, *twice = (min(bits, _KNOWS_NOTHING) for bits in (plan.bits_per_byte, low, high, *plan.twice))
    between = f", between {low:.2f} and {high:.2f}" if plan.is_known else ""
    rates = f"{run.optimizer.learning_rate:g}"
    if run.optimizer.optimizer == "muon":
        of_matrices = run.optimizer.muon_learning_rate or run.optimizer.learning_rate
        rates = f"{of_matrices:g} for the matrices of the layers, {rates} for the rest"
    decay = run.optimizer.ema_decay
    average = "" if decay is None else f", and an average of the weights with a decay rate of {decay:g}"
    compiled = " with compiled blocks" if run.training.torch_compile else ""
    lines = [
        f"text     {facts.documents:,} document{'s' * (facts.documents != 1)}; to train on {short(facts.text_bytes)} "
        f"bytes, {short(facts.tokens)} tokens ({plan.encoding.name}, vocabulary of {plan.encoding.n_vocab:,}); "
        f"{facts.repeated:.0%} are in repeated lines",
        f"shape    {chosen.size} with {chosen.heads} head{'s' * (chosen.heads > 1)}, {short(chosen.parameters)} "
        "parameters" + (f"; the best of {plan.tried} shapes" if plan.tried > 1 else ""),
        f"length   {plan.steps:,} step{'s' * (plan.steps != 1)} of {chosen.batch_size} x {chosen.context} tokens: the "
        f"text is read {plan.epochs:.2g} times",
        f"rates    {run.optimizer.optimizer}, {rates}; weight decay {run.optimizer.weight_decay:g}, dropout "
        f"{run.model.dropout or 0:g}{average}",
        f"needs    about {duration(plan.seconds)}{compiled}, {file_size(plan.memory_bytes)} of memory "
        f"({file_size(available_memory())} are free), {file_size(plan.disk_bytes)} of disk",
        f"expected {expected:.2f} bits per byte of the held-out text{between}; gzip -9 reaches {facts.gzip:.2f}",
        f"expected with twice the budget {twice[0]:.2f}, with twice the text {twice[1]:.2f}",
    ]
    if not plan.is_known:
        lines.append(f"note     {MEASURED.told()}: outside of that the expectation is a guess")
    return [*lines, *(f"note     {note}" for note in plan.notes)]


def check_plan_file(file: Path, log: Report) -> None:
    """Say what is known of the file of a plan before that is made. Raises UsageError if it cannot be written."""
    if file.is_dir():
        raise UsageError(f"plan_file {str(file)!r} is a folder: name another file by --plan_file")
    holder = next(folder for folder in file.absolute().parents if folder.exists())
    if not (holder.is_dir() and os.access(holder, os.W_OK)):
        raise UsageError(f"plan_file {str(file)!r} cannot be written in {str(holder)!r}: name another by --plan_file")
    if file.exists():
        log(f"note     {file} exists: another plan is not written over it, --plan_file names another file")


def write_plan(plan: Plan, file: Path, budget: str) -> None:
    """Write the options of a plan as YAML. Raises UsageError if the file exists and holds anything else."""
    import yaml

    head = f"# A plan for {budget} by gpt-kit plan: gpt-kit train --config {shlex.quote(str(file))}\n"
    text = head + yaml.safe_dump(plan.values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    try:
        if file.exists() and file.read_bytes() != text.encode():
            raise UsageError(f"plan_file {str(file)!r} exists, and is not replaced: name another file by --plan_file")
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text)
    except OSError as error:
        raise UsageError(f"plan_file {str(file)!r} cannot be written: {error.strerror}") from None
