"""`gpt-kit evaluate` and `check`."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from gpt_kit_hf.commands.running import note, write
from gpt_kit_hf.errors import GPTKitError
from gpt_kit_hf.evaluation.invariance import check_invariance
from gpt_kit_hf.evaluation.score import score_model
from gpt_kit_hf.hub.model_folder import find_model_folder, load_pretrained, move_to_device
from gpt_kit_hf.options.evaluation import CheckOptions, EvaluateOptions
from gpt_kit_hf.storage.atomic_files import save_json
from gpt_kit_hf.storage.run_folder import INVARIANCE_FILE, holds_run


def evaluate(options: EvaluateOptions) -> None:
    """Show what a model scores on text, rows or benchmark tasks."""
    if options.tasks:
        _evaluate_tasks(options)
        return
    report = score_model(options.model_name_or_path, options)
    write(report.text() + "\n")
    if options.output_json is not None:
        save_json(Path(options.output_json), report.to_dict())


def _evaluate_tasks(options: EvaluateOptions) -> None:
    # Not at the top: it is an extra, and its import is slow.
    from gpt_kit_hf.evaluation.lm_eval import run_harness

    report = run_harness(
        options.model_name_or_path,
        options.tasks or [],
        include_path=options.include_path,
        limit=options.limit,
        batch_size=options.batch_size,
        max_length=options.max_length,
        device=options.device,
    )
    write(report.text() + "\n")
    if options.output_json is not None:
        save_json(Path(options.output_json), report.results)


def check(options: CheckOptions) -> None:
    """Show whether a model's answers depend on how it is asked. Raises GPTKitError if they do."""
    place = options.model_name_or_path
    model = load_pretrained(AutoModelForCausalLM, find_model_folder(place), place)
    move_to_device(model, options.device)
    report = check_invariance(
        model,
        attention=options.attention or None,
        compile_flex=options.compile_flex,
        seed=options.seed,
        announce=note,
    )
    write(report.table() + "\n")
    if options.output_json is not None:
        save_json(Path(options.output_json), report.to_dict())
    if Path(place).is_dir() and holds_run(Path(place)):
        save_json(Path(place) / INVARIANCE_FILE, report.to_dict())  # for its model card
    if not report.holds:
        raise GPTKitError(f"{report.verdict()}: {', '.join(cell.name for cell in report.failures)}")
