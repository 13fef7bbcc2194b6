"""transformers' own common model tests: none fails on this package's classes, and GPT-2's classes pass no more."""

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


@pytest.mark.slow
def test_no_common_test_fails_and_gpt2_passes_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        tests = fetch_tests(transformers.__version__)
    except SourceDistributionUnavailableError as error:
        pytest.skip(str(error))
    assemble(tests, tmp_path)
    ours, gpt2 = run_suite(tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\n{summary(ours, gpt2)}\n")
    assert not ours.failed
    assert len(ours.passed) >= len(gpt2.passed) > 0


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


def run_suite(folder: Path) -> tuple[Outcomes, Outcomes]:
    """Run suite.py in a pytest of its own, without this project's settings; return ours and GPT-2's outcomes."""
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
    ours, gpt2 = read(report, "GPTKit"), read(report, "GPT2")
    # pytest's status says whether the report is complete: 0, or 1 where a test failed.
    expected_status = 1 if ours.failed or gpt2.failed else 0
    assert finished.returncode == expected_status, finished.stdout + finished.stderr
    return ours, gpt2


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


def summary(ours: Outcomes, gpt2: Outcomes) -> str:
    lines = [f"transformers {transformers.__version__}'s common model tests, torch {torch.__version__}:"]
    for name, outcomes in (("this package", ours), ("transformers' GPT-2", gpt2)):
        counts = f"{len(outcomes.passed)} passed, {len(outcomes.failed)} failed, {outcomes.skipped.total()} skipped"
        lines.append(f"  {name}: {counts}")
        lines += [f"    failed: {test}: {message}" for test, message in sorted(outcomes.failed.items())]
    lines.append("  skipped on this package, by reason:")
    lines += [f"    {count:3} {reason}" for reason, count in ours.skipped.most_common()]
    return "\n".join(lines)
