"""transformers' own common model tests: none fails on this package's shapes, which pass what GPT-2 and Qwen3 do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest
import stand_ins
import torch
import transformers
from source_distribution import SourceDistributionUnavailableError, fetch_tests

HERE = Path(__file__).resolve().parent


@dataclass
class Outcomes:
    """What became of the tests of one model: names, and skips by reason."""

    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


# Each shape of this package, and the model of transformers that has it.
THEIRS = {"Classic": "GPT2", "Modern": "Qwen3"}
# What Qwen3 passes and this package does not: rows beyond `max_position_embeddings`, scalings that depend on the
# longest row of a batch, and the window of attention that Qwen3 has.
NOT_OURS = {
    *(f"Test.test_model_rope_scaling_from_config_{kind}" for kind in ("0_linear", "1_dynamic", "2_yarn")),
    "Test.test_model_rope_scaling_frequencies",
    "Test.test_sliding_window_mask",
}


@pytest.mark.slow
def test_no_common_test_fails_and_models_of_transformers_pass_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        tests = fetch_tests(transformers.__version__)
    except SourceDistributionUnavailableError as error:
        pytest.skip(str(error))
    assemble(tests, tmp_path)
    outcomes = run_suite(tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\n{summary(outcomes)}\n")
    for ours, theirs in THEIRS.items():
        assert not outcomes[ours].failed
        passed, expected = ({test.removeprefix(name) for test in outcomes[name].passed} for name in (ours, theirs))
        assert expected
        assert expected - passed <= NOT_OURS


def assemble(tests: Path, folder: Path) -> None:
    """Make the package `tests` in the folder: the distribution's files, and what they import beside them."""
    package = folder / "tests"
    shutil.copytree(tests, package)
    (package / "__init__.py").touch()
    shutil.copy(HERE / "stand_ins.py", package)
    for file, names in stand_ins.MISSING.items():
        missing = package / file
        if not missing.exists():
            missing.parent.mkdir(exist_ok=True)
            missing.write_text(f"from tests.stand_ins import {', '.join(names)}\n")


def run_suite(folder: Path) -> dict[str, Outcomes]:
    """Run suite.py in a pytest of its own, without this project's settings; return the outcomes of each model."""
    settings, report = folder / "pytest.ini", folder / "report.xml"
    settings.write_text("[pytest]\nfilterwarnings = ignore\n")
    options = ["-c", settings, "--rootdir", folder, "--noconftest", "-p", "no:cacheprovider", "--junitxml", report]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", "--import-mode=importlib", *map(str, options), HERE / "suite.py"],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), finished.stdout + finished.stderr
    outcomes = {name: read(report, name) for pair in THEIRS.items() for name in pair}
    # pytest's status says whether the report is complete: 0, or 1 where a test failed.
    expected_status = 1 if any(of_model.failed for of_model in outcomes.values()) else 0
    assert finished.returncode == expected_status, finished.stdout + finished.stderr
    return outcomes


def environment(folder: Path) -> dict[str, str]:
    """Return the child's environment: the same tests whatever the machine has, and no network."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "RUN_SLOW")}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRANSFORMERS_TEST_DEVICE": "cpu",
    }


def read(report: Path, prefix: str) -> Outcomes:
    """Read the tests of the classes with this prefix; a test of which a part was skipped counts as skipped."""
    outcomes = Outcomes()
    for case in ElementTree.parse(report).iter("testcase"):
        class_name = case.get("classname", "").rpartition(".")[2]
        name = f"{class_name}.{case.get('name')}"
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if not class_name.startswith(prefix):
            continue
        if broken is not None:
            outcomes.failed[name] = broken.get("message", "")
        elif skipped is not None:
            outcomes.skipped[skipped.get("message", "")] += 1
        else:
            outcomes.passed.add(name)
    return outcomes


def summary(outcomes: dict[str, Outcomes]) -> str:
    lines = [f"transformers {transformers.__version__}'s common model tests, torch {torch.__version__}:"]
    for name, of_model in outcomes.items():
        counts = f"{len(of_model.passed)} passed, {len(of_model.failed)} failed, {of_model.skipped.total()} skipped"
        lines.append(f"  {name}: {counts}")
        lines += [f"    failed: {test}: {message}" for test, message in sorted(of_model.failed.items())]
    for name in THEIRS:
        lines.append(f"  skipped on {name}, by reason:")
        lines += [f"    {count:3} {reason}" for reason, count in outcomes[name].skipped.most_common()]
    return "\n".join(lines)
