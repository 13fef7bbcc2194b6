"""Which options may change when a run is resumed, as a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.options.declare import flat_declarations
from gpt_kit_hf.options.run import (
    FinetuneOptions,
    RunOptions,
    changed_options,
    flat_options,
    parse_finetune_options,
    parse_run_options,
    stored_options,
)

FREE = {
    "training.output_dir", "training.resume", "training.overwrite", "training.per_device_train_batch_size",
    "training.remote_dir",
    "training.eval_steps", "training.max_eval_samples", "training.save_steps", "training.save_total_limit",
    "training.keep_best", "training.load_best_model_at_end", "training.metric_for_best_model",
    "training.early_stopping_patience", "training.early_stopping_threshold",
    "training.async_save", "training.logging_steps", "training.log_format",
    "training.sample_steps",
    "training.sample_prompt", "training.sample_max_new_tokens", "training.report_to",
    "training.project", "training.run_name", "training.trackio_space_id",
    "training.dataloader_num_workers", "training.max_skipped_updates", "training.out_of_memory",
    "training.ddp_timeout", "training.gradient_checkpointing", "training.allow_changes", "text.num_proc",
    "text.token_cache_dir",
    "rows.unknown_keys", "plan.budget",
}  # fmt: skip
ALLOWED = {
    "training.max_steps", "training.num_train_epochs", "training.mixed_precision", "training.torch_compile",
    "training.use_cpu", "training.deterministic", "training.spike_factor", "optimizer.learning_rate",
    "optimizer.lr_scheduler_type", "training.attn_implementation",
    "optimizer.warmup_steps", "optimizer.min_lr_ratio", "optimizer.decay_ratio", "optimizer.weight_decay",
    "optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_epsilon", "optimizer.max_grad_norm",
    "optimizer.muon_momentum", "optimizer.muon_learning_rate",
}  # fmt: skip


@pytest.mark.parametrize("kind", [RunOptions, FinetuneOptions])
def test_the_rules_for_resuming_are_this_table(kind: type) -> None:
    declared = flat_declarations(kind)
    assert {name for name, each in declared.items() if each.resume == "free"} == FREE & declared.keys()
    assert {name for name, each in declared.items() if each.resume == "allowed"} == ALLOWED & declared.keys()
    of_text = {name for name in declared if name.startswith("text.")} - FREE
    assert {name for name, each in declared.items() if each.resume == "text"} == of_text
    assert {name for name, each in declared.items() if each.card == "hidden"} == FREE & declared.keys()


def run(**changes: Any) -> RunOptions:
    words = ["--output_dir=x", "--text_files=a", *(f"--{name}={value}" for name, value in changes.items())]
    return parse_run_options(words)


RUN = Path("runs/x")


def test_a_change_is_free_or_allowed_or_refused() -> None:
    stored = flat_options(run())
    assert changed_options(stored, run(), RUN) == {}
    assert changed_options(stored, run(eval_steps=7), RUN) == {"training.eval_steps": [None, 7]}
    with pytest.raises(UsageError, match=r"_rate was 0\.04, is 0\.1.*allow it by --allow_changes learning_rate$"):
        changed_options(stored, run(learning_rate=0.1), RUN)
    named = run(resume=True, learning_rate=0.1, allow_changes="learning_rate")
    assert changed_options(stored, named, RUN)["optimizer.learning_rate"] == [0.04, 0.1]
    with pytest.raises(UsageError, match=r"training\.batch_size was 32, is 8.*or name another output_dir$"):
        changed_options(stored, run(batch_size=8, learning_rate=0.1, resume=True, allow_changes="learning_rate"), RUN)


def test_the_recipe_of_a_run_of_before_is_named() -> None:
    stored = flat_options(run(recipe="plain"))
    with pytest.raises(UsageError, match=r"give them as they were, or for AdamW's defaults give --recipe plain, or"):
        changed_options(stored, run(), RUN)
    with pytest.raises(UsageError, match=r"give them as they were, or name another output_dir$"):
        changed_options(stored, run(optimizer="muon"), RUN)


def test_other_text_needs_the_name_text_alone() -> None:
    stored = flat_options(run())
    with pytest.raises(
        UsageError, match=r"text\.text_column was 'text', is 'body'.*allow it by --allow_changes text$"
    ):
        changed_options(stored, run(text_column="body"), RUN)
    with pytest.raises(UsageError, match=r"text_column .*allow it by --allow_changes max_steps text$"):
        changed_options(stored, run(text_column="body", resume=True, allow_changes="max_steps", max_steps=3), RUN)
    changed = changed_options(stored, run(text_column="body", resume=True, allow_changes="text"), RUN)
    assert changed["text.text_column"] == ["text", "body"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_changes": "learning_rte", "resume": True}, "did you mean 'learning_rate'"),
        ({"allow_changes": "learning_rte"}, "unknown changeable option 'learning_rte'"),
        ({"allow_changes": "batch_size", "resume": True}, "unknown changeable option 'batch_size'"),
        ({"allow_changes": "text"}, "allow_changes=text is for resuming a run: add --resume"),
    ],
)
def test_allow_changes_names_what_can_change_and_needs_resume(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(**changes)
    with pytest.raises(UsageError, match="unknown changeable option 'text'"):
        parse_finetune_options(
            ["--output_dir=x", "--model_name_or_path=m", "--rows=a", "--resume", "--allow_changes=text"]
        )


def test_an_option_that_is_newer_than_the_run_was_at_its_default() -> None:
    stored = flat_options(run())
    for name in ("optimizer.adam_epsilon", "model.use_bias", "training.report_to", "text.streaming"):
        del stored[name]
    assert changed_options(stored, run(), RUN) == {}
    words = ["--output_dir=x", "--model_name_or_path=m", "--rows=a"]
    tuned = flat_options(parse_finetune_options(words))
    del tuned["optimizer.learning_rate"]
    assert changed_options(tuned, parse_finetune_options(words), RUN) == {}


def test_stored_options_come_back_or_are_refused() -> None:
    options = run(dropout=0.1, report_to="none")
    stored = flat_options(options)
    assert stored_options(RunOptions, stored) == options
    for change in ({"training.unknown": 1}, {"unknown.x": 1}, {"training.batch_size": 0}, {"training.seed": "a"}):
        with pytest.raises(CheckpointError, match="not the options of a run of this version"):
            stored_options(RunOptions, {**stored, **change})
    assert stored_options(RunOptions, flat_options(replace(options))) == options
    # Older versions took the option without resume.
    assert stored_options(RunOptions, {**stored, "training.allow_changes": ["max_steps"]}) == options
