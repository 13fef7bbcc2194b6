"""A text that changed between two sessions of a run: refused, or trained on from the step where the run was."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pretrain import LINES, assert_same_run, killed_copy, options, update_lines

from gpt_kit_hf import UsageError, train
from gpt_kit_hf.data.order import ShuffledOrder
from gpt_kit_hf.data.text.corpus import prepare_corpus
from gpt_kit_hf.data.text.windows import TokenWindows, collate_windows
from gpt_kit_hf.hub.card.card import card_facts, render_card
from gpt_kit_hf.options.data import TextOptions
from gpt_kit_hf.storage.atomic_files import read_jsonl
from gpt_kit_hf.tokenization.export import load_encoding
from gpt_kit_hf.training.replay import replay_steps
from gpt_kit_hf.training.state.batch_digests import batch_digest, content_digest
from gpt_kit_hf.training.verify import verify_run

ALLOWED: dict[str, Any] = {"resume": True, "allow_changes": ["text"]}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was killed after step 4 of 12, and its text file, which has grown since."""
    folder = tmp_path_factory.mktemp("grown")
    file = folder / "lines.txt"
    file.write_text("".join(LINES) * 8)
    train(options(folder / "whole", str(file)), stream=None)
    killed_copy(folder / "whole", folder / "begun", "step-00000008", "step-00000012")
    file.write_text("".join(LINES) * 8 + "A newer line of the text.\n" * 60)
    return folder / "begun", file


@pytest.fixture(scope="module")
def grown(begun: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run continued with the new text, and what it output."""
    run, output = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    shutil.copytree(begun[0], run)
    train(options(run, str(begun[1]), **ALLOWED), stream=output)
    return run, output.getvalue()


def test_a_changed_text_is_refused_with_the_option_that_allows_it(begun: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"other data \(train_tokens was 3457, is \d+; .*--allow_changes text$"):
        train(options(begun[0], str(begun[1]), resume=True), stream=None)
    assert "data_changed" not in (begun[0] / "run.json").read_text()


def test_batches_after_the_change_are_those_of_the_new_text_at_the_same_position(
    begun: tuple[Path, Path], grown: tuple[Path, str]
) -> None:
    before, lines = update_lines(begun[0])[:4], update_lines(grown[0])
    assert (lines[:4], len(lines)) == (before, 12)
    encoding = load_encoding(begun[0] / "checkpoints/step-00000004")  # as it was trained on the old text
    assert (grown[0] / "tokenizer.json").read_text() == (
        begun[0] / "checkpoints/step-00000004/tokenizer.json"
    ).read_text()
    windows = TokenWindows(
        prepare_corpus(TextOptions(text_files=[str(begun[1])]), encoding, seed=0).train, max_length=16, stride=12
    )
    order = ShuffledOrder(samples=len(windows), seed=0)
    for step in range(4, 12):
        ids = order.ids(np.arange(step * 6, (step + 1) * 6))
        batch = collate_windows([windows[number] for number in ids.tolist()])
        assert lines[step]["batch"] == batch_digest(ids, content_digest([batch])), step


def test_the_change_is_logged_recorded_and_on_the_card(begun: tuple[Path, Path], grown: tuple[Path, str]) -> None:
    run, output = grown
    record, old = (json.loads((folder / "run.json").read_text()) for folder in (run, begun[0]))
    change = record["sessions"][-1]["data_changed"]
    assert record["sessions"][-1]["after_step"] == 4
    for name in ("data_fingerprint", "documents", "train_tokens", "eval_tokens", "eval_fingerprint"):
        assert (change["before"][name], change["now"][name]) == (old[name], record[name])
    assert change["before"]["train_tokens"] == 3457 < change["now"]["train_tokens"]
    assert f"the text changed after step 4: 1 to 1 documents, 3,457 to {record['train_tokens']:,} train" in output
    assert "the evaluation text changed, too: compare no scores across step 4" in output
    card = render_card(card_facts(run))
    assert (
        f"After step 4 the text changed from 3,457 training tokens (fingerprint `{old['data_fingerprint']}`)" in card
    )
    assert f"to {record['train_tokens']:,} training tokens (fingerprint `{record['data_fingerprint']}`)" in card


def test_a_run_interrupted_after_the_change_resumes_to_the_bit(
    begun: tuple[Path, Path], grown: tuple[Path, str], tmp_path: Path
) -> None:
    run = killed_copy(grown[0], tmp_path / "later", "step-00000012")
    train(options(run, str(begun[1]), resume=True), stream=None)
    assert_same_run(grown[0], run)
    # Killed before the first checkpoint after the change: the record has the new text, the checkpoint the old one.
    run = killed_copy(grown[0], tmp_path / "soon", "step-00000008", "step-00000012")
    with pytest.raises(UsageError, match="--allow_changes text"):
        train(options(run, str(begun[1]), resume=True), stream=None)
    train(options(run, str(begun[1]), **ALLOWED), stream=None)
    assert_same_run(grown[0], run)
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert sessions[-1]["data_changed"] == sessions[-2]["data_changed"]


def test_best_checkpoints_are_chosen_among_scores_on_the_new_evaluation_text(
    begun: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(begun[0], tmp_path / "run"))
    lines = read_jsonl(run / "metrics.jsonl")
    scored = {"kind": "eval", "step": 4, "loss": 0.01, "bits_per_byte": 0.01, "tokens": 9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*lines[:4], scored]))
    train(options(run, str(begun[1]), **ALLOWED, keep_best=1, save_total_limit=1), stream=None)
    assert not (run / "checkpoints/step-00000004").exists()


def test_verify_and_replay_of_a_run_whose_text_changed(grown: tuple[Path, str]) -> None:
    assert verify_run(grown[0]).problems == []
    assert replay_steps(grown[0], 5, 7, log=lambda line: None).text() == "steps 5 to 7: identical"
    assert replay_steps(grown[0], 9, 12, log=lambda line: None).tolerance == 0
    with pytest.raises(UsageError, match=r"the steps up to 4 were computed on other text .* replay steps from 5 on"):
        replay_steps(grown[0], 3, 6, log=lambda line: None)


def test_a_run_without_steps_left_needs_more_of_them(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(begun[0].parent / "whole", tmp_path / "run"))
    before = (run / "run.json").read_text()
    with pytest.raises(UsageError, match=r"has done all its 12 steps.*--allow_changes text max_steps"):
        train(options(run, str(begun[1]), **ALLOWED), stream=None)
    assert (run / "run.json").read_text() == before
    allowed = {"resume": True, "allow_changes": ["text", "max_steps"]}
    assert train(options(run, str(begun[1]), **allowed, max_steps=14), stream=None).steps == 14


def test_allowed_but_unchanged_text_only_resumes(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, file = Path(shutil.copytree(begun[0].parent / "whole", tmp_path / "run")), tmp_path / "lines.txt"
    file.write_text("".join(LINES) * 8)
    # The same text under another name: an option of the text that differs.
    train(options(run, str(file), **ALLOWED), stream=None)
    session = json.loads((run / "run.json").read_text())["sessions"][-1]
    assert session["changed_options"]["text.text_files"] == [[str(begun[1])], [str(file)]]
    assert "data_changed" not in session
    assert_same_run(begun[0].parent / "whole", run)
