"""The templates for clusters: their commands, and runs that are preempted and started again."""

from __future__ import annotations

import shlex

import pytest
from programs import ROOT, run_program

from gpt_kit_hf import parse_run_options

TEMPLATES = ROOT / "examples" / "cluster"
CONFIG = str(ROOT / "examples" / "configs" / "quickstart.yaml")


@pytest.mark.parametrize("template", ["slurm.sh", "skypilot.yaml", "kubernetes.yaml", "hf_jobs.sh"])
def test_the_command_of_a_template_has_valid_options(template: str) -> None:
    text = (TEMPLATES / template).read_text().replace("gpt-kit, train,", "gpt-kit train").replace(", ", " ")
    text = text.replace("$bucket", "hf://buckets/user/my-runs/mine")
    [command] = [line for line in text.splitlines() if "gpt-kit train" in line]
    words = shlex.split(command.partition("gpt-kit train")[2].rstrip("]&'"))
    assert words[0] == "--config"
    options = parse_run_options(["--config", CONFIG, *words[2:]])
    assert options.training.resume
    assert options.training.output_dir.endswith("/mine")


@pytest.mark.slow  # test_kill_campaign.py kills runs, too
def test_a_run_that_is_preempted_ends_as_one_that_is_not() -> None:
    said = run_program("preemptions", "kubernetes", "--preemptions", "3")
    assert said.startswith("kubernetes   3 preemptions")
    assert said.endswith("identical\n")


@pytest.mark.slow
def test_twenty_preemptions_of_each_template_change_nothing() -> None:
    said = run_program("preemptions", "slurm", "skypilot", "kubernetes", "hf_jobs", "--preemptions", "20")
    assert said.count("identical") == 4
