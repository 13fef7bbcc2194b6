"""Tasks of lm-evaluation-harness on a model; local tasks need no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.generate import context_length
from gpt_kit_hf.hub.model_folder import check_tokenizer, find_model_folder, load_pretrained


@dataclass(frozen=True, kw_only=True)
class HarnessReport:
    """The harness' `results` by task and metric, as JSON, and its table."""

    results: Mapping[str, Any]
    table: str

    def text(self) -> str:
        """Return the table."""
        return self.table


def run_harness(
    place: str,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str = "cpu",
) -> HarnessReport:
    """Run tasks of lm-evaluation-harness on the model of a run, a folder or a Hub repository.

    `include_path` is a folder with your own task files (YAML); those that name local files need no network. A text
    that a task scores by its rolling log-likelihood gets the bits per byte of `gpt-kit evaluate`: both read it after
    an EOS token, in the same windows.

    Raises UsageError if lm-eval is not installed, for a model that cannot be loaded, and for an unknown task.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-eval ({error}): pip install 'gpt-kit-hf[eval]'") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"include_path {include_path!r}: no such folder")
    folder = find_model_folder(place)
    tokenizer = load_pretrained(AutoTokenizer, folder, place)
    model = load_pretrained(AutoModelForCausalLM, folder, place)
    check_tokenizer(folder, model.config)
    if tokenizer.pad_token is None:  # the harness masks its padding
        tokenizer.pad_token = tokenizer.eos_token
    manager = TaskManager(include_path=include_path)
    unknown = sorted(set(tasks) - set(manager.match_tasks(list(tasks))))
    if unknown:
        raise UsageError(f"unknown task {unknown[0]!r}: name a task of lm-eval, or give include_path")
    wrapped = HFLM(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length or context_length(model),
        device=device,
    )
    found = simple_evaluate(
        model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    results = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
    return HarnessReport(results=json.loads(json.dumps(results, default=str)), table=make_table(found))
