"""`gpt-kit train`, `plan`, `finetune` and `verify`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from gpt_kit_hf.commands.running import note, write
from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.options.evaluation import VerifyOptions
from gpt_kit_hf.options.run import FinetuneOptions, PlanOptions, RunOptions
from gpt_kit_hf.training.finetune import finetune as run_finetuning
from gpt_kit_hf.training.log.console import Console
from gpt_kit_hf.training.planning.page import check_plan_file, page_lines, write_plan
from gpt_kit_hf.training.planning.plan import make_plan
from gpt_kit_hf.training.pretrain import train as run_pretraining
from gpt_kit_hf.training.replay import replay_steps
from gpt_kit_hf.training.verify import verify_run


def train(options: RunOptions) -> None:
    """Pretrain a GPT on text."""
    run_pretraining(options, stream=sys.stdout)


def plan(options: PlanOptions) -> None:
    """Plan a run for a budget, print the plan, and write it."""
    log = Console(sys.stdout, options.training.log_format).log
    file = Path(options.plan.plan_file)
    check_plan_file(file, log)
    made = make_plan(options, log)
    for line in page_lines(made):
        log(line)
    write_plan(made, file, options.plan.budget)
    piped = ", with the same text piped into it" if "-" in (options.text.text_files or []) else ""
    log(f"next     gpt-kit train --config {shlex.quote(options.plan.plan_file)}{piped}")


def finetune(options: FinetuneOptions) -> None:
    """Finetune a model on instruction rows."""
    run_finetuning(options, stream=sys.stdout)


def verify(options: VerifyOptions) -> None:
    """Check a run folder, and compute steps again if asked to. Raises CheckpointError if anything differs."""
    folder = Path(options.run)
    found = verify_run(folder)
    for line in [*found.lines, *(f"FAULT  {problem}" for problem in found.problems)]:
        write(f"{line}\n")
    if found.problems:
        raise CheckpointError(f"{options.run}: {len(found.problems)} faults, the first: {found.problems[0]}")
    if options.steps is not None:
        replayed = replay_steps(folder, *options.steps, log=note)
        if replayed.difference:
            raise CheckpointError(replayed.difference)
        write(f"{replayed.text()}\n")
