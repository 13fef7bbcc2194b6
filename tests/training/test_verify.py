"""Verifying and replaying runs: what is whole passes, what was changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_pretrain import finished, options, text_file, update_lines  # noqa: F401

from gpt_kit_hf import RunOptions, UsageError, train
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.options.run import flat_options, stored_options
from gpt_kit_hf.training.replay import replay_steps
from gpt_kit_hf.training.state.batch_digests import batch_digest, chained, content_digest, halves, joined
from gpt_kit_hf.training.verify import verify_run


def test_intact_run_has_no_problems(finished: tuple[Path, str]) -> None:  # noqa: F811
    found = verify_run(finished[0])
    assert found.problems == []
    assert "metrics.jsonl  12 steps, each once" in found.lines[0]


def edit_lines(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        change(lines)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


def flip(name: str) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[-5] ^= 1
        (run / name).write_bytes(data)

    return edit


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a step is missing": (edit_lines(lambda lines: lines.pop(3)), "stands where step"),
    "a step is there twice": (edit_lines(lambda lines: lines.insert(3, lines[3])), "stands where step"),
    "another batch": (edit_lines(lambda lines: lines[2].update(batch="0" * 16)), "the chain of step 3"),
    "weights of a checkpoint": (
        flip("checkpoints/step-00000008/model.safetensors"),
        "step-00000008: model.safetensors",
    ),
    "optimizer": (flip("checkpoints/step-00000012/optimizer.safetensors"), "step-00000012: optimizer.safetensors"),
    "weights of the root": (flip("model.safetensors"), "model.safetensors is not that of step-00000012"),
    "a file is gone": (lambda run: (run / "checkpoints/step-00000004/config.json").unlink(), "config.json is missing"),
    "options are torn": (lambda run: (run / "options.json").write_text('{"a'), "not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_changed_file_is_named(fault: str, finished: tuple[Path, str], tmp_path: Path) -> None:  # noqa: F811
    change, output = FAULTS[fault]
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    change(run)
    problems = verify_run(run).problems
    assert any(output in problem for problem in problems), problems


def test_replay_computes_steps_to_the_bit(finished: tuple[Path, str], tmp_path: Path) -> None:  # noqa: F811
    output: list[str] = []
    for first, last in ((9, 12), (6, 7), (1, 3)):
        replayed = replay_steps(finished[0], first, last, log=output.append)
        assert replayed.text() == f"steps {first} to {last}: identical"
    assert output[:2] == ["from step-00000008", "from step-00000004"]
    assert output[2:] == ["from the beginning: there is no checkpoint before step 1"]
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    edit_lines(lambda lines: [line.update(loss=line["loss"] + 1e-7) for line in lines if line["step"] == 11])(run)
    assert replay_steps(run, 9, 12, log=output.append).difference.startswith("step 11 differs: loss is")
    with pytest.raises(UsageError, match="the run has the steps 1 to 12"):
        replay_steps(run, 9, 13, log=output.append)


def test_deterministic_run_records_what_its_bits_depend_on(
    finished: tuple[Path, str],  # noqa: F811
    text_file: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    train(options(tmp_path / "run", text_file, deterministic=True), stream=None)
    assert not torch.are_deterministic_algorithms_enabled()
    [session] = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert (
        session.items()
        >= {
            **{"deterministic": True, "precision": "fp32", "compiled": False, "attention": "sdpa", "device": "cpu"},
            **{"processes": 1, "threads": torch.get_num_threads()},
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }.items()
    )
    assert update_lines(tmp_path / "run") == update_lines(finished[0])  # a CPU computes so either way
    replayed = replay_steps(tmp_path / "run", 11, 12, log=lambda line: None)
    assert replayed.text() == "steps 11 to 12: identical"


def test_replay_computes_with_the_attention_of_the_run(text_file: str, tmp_path: Path) -> None:  # noqa: F811
    train(options(tmp_path / "run", text_file, attn_implementation="eager", max_steps=4), stream=None)
    assert replay_steps(tmp_path / "run", 3, 4, log=lambda line: None).text() == "steps 3 to 4: identical"


# A fact of the recorded session, edited as another machine or an earlier version would have written it, and the note.
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "another kind of CPU": ({"cpu_capability": "AVX1"}, "cpu_capability was AVX1, is "),
    "another size of micro-batch": ({"micro_batch_size": 5}, "micro_batch_size was 5, is "),
    "compiled": ({"compiled": True}, "compiled was True, is False"),
    "another attention": ({"attention": "eager"}, "attention was eager, is sdpa"),
    "another precision": ({"precision": "bf16"}, "precision was bf16, is fp32"),
    "a GPU": ({"gpu": "NVIDIA H100", "driver": "570.1", "device": "cuda"}, "device was cuda, is cpu"),
    "an earlier version": ({"compiled": None, "attention": None}, "not recorded: compiled, attention"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_replay_allows_rounding_where_a_fact_differs(case: str, finished: tuple[Path, str], tmp_path: Path) -> None:  # noqa: F811
    """Losses that differ by rounding are no alarm then, and the note says which fact differs."""
    facts, note = OTHERWISE[case]
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    session = {**record["sessions"][0], **facts}
    record["sessions"] = [{name: value for name, value in session.items() if value is not None}]
    (run / "run.json").write_text(json.dumps(record))
    rounded = edit_lines(lambda lines: [line.update(loss=line["loss"] + 1e-5) for line in lines if line["step"] == 11])
    rounded(run)
    output: list[str] = []
    tolerance = 0.005 if facts.get("precision") == "bf16" else 0.0001
    text = replay_steps(run, 10, 11, log=output.append).text()
    assert text == f"steps 10 to 11: the same batches, losses within {tolerance:g}"
    assert any(
        line.startswith(f"note: {note}") and line.endswith(": losses may differ by rounding") for line in output
    )
    wrong = edit_lines(lambda lines: [line.update(loss=line["loss"] + 0.5) for line in lines if line["step"] == 11])
    wrong(run)
    assert replay_steps(run, 10, 11, log=output.append).difference.startswith("step 11 differs: loss is")


def test_content_digest_ignores_micro_batches_and_padding() -> None:
    ids = torch.randint(0, 50, (6, 9))
    targets = torch.randint(0, 50, (6, 9))
    targets[:, 7:] = -100
    whole = content_digest([Batch(ids, targets)])
    assert content_digest([Batch(ids[4:], targets[4:]), Batch(ids[:4], targets[:4])]) == whole
    assert content_digest([Batch(ids[:, :7], targets[:, :7])]) == whole  # other padding
    other = ids.clone()
    other[2, 3] += 1
    assert content_digest([Batch(other, targets)]) != whole
    low, high = np.sum([halves(whole), halves(whole)], axis=0).tolist()
    assert joined(low, high) == 2 * whole % 2**64
    assert batch_digest(np.arange(3), whole) != batch_digest(np.arange(3)[::-1], whole)
    assert chained(chained("", "a"), "b") != chained(chained("", "b"), "a")


def test_stored_options_equal_the_original(finished: tuple[Path, str], text_file: str, tmp_path: Path) -> None:  # noqa: F811
    asked = options(tmp_path / "run", text_file)
    assert stored_options(RunOptions, json.loads(json.dumps(flat_options(asked)))) == asked


def test_allowed_change_of_options_is_recorded(
    finished: tuple[Path, str],  # noqa: F811
    text_file: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    with pytest.raises(UsageError, match=r"training.max_steps was 12, is 14\): .* --allow_changes max_steps"):
        train(options(run, text_file, resume=True, max_steps=14), stream=None)
    train(options(run, text_file, resume=True, max_steps=14, allow_changes=["max_steps"]), stream=None)
    assert update_lines(run)[:12] == update_lines(finished[0])
    assert len(update_lines(run)) == 14
    session = json.loads((run / "run.json").read_text())["sessions"][-1]
    assert session["changed_options"]["training.max_steps"] == [12, 14]
    with pytest.raises(UsageError, match="unknown changeable option 'seed'"):
        train(options(run, text_file, resume=True, allow_changes=["seed"], max_steps=14), stream=None)
