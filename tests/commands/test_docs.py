"""The documentation names only options, files, modules and Python names that exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import gpt_kit_hf
from gpt_kit_hf.commands.main import COMMANDS
from gpt_kit_hf.options.declare import sections_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LAUNCHERS = {"examples/pretrain.py": "train", "examples/finetune_instructions.py": "finetune"}
GENERAL = {"help", "config", "print_config"}
RECIPE = {"train": {"recipe"}}


def options_of(command: str) -> set[str]:
    """Return the names of a command's options."""
    declared = {name for section in sections_of(COMMANDS[command].options).values() for name in section.options}
    return declared | GENERAL | RECIPE.get(command, set())


ALL_OPTIONS = set().union(*(options_of(command) for command in COMMANDS))


def code_blocks(page: Path, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks of these languages, without their indentation."""
    for found in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.M | re.S):
        if found[2] in languages:
            yield re.sub(rf"^{found[1]}", "", found[3], flags=re.M)


def shell_lines(page: Path) -> Iterator[str]:
    """Yield each command line of the shell blocks, continued lines joined; of a console block, what was typed."""
    for block in code_blocks(page, "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.removeprefix("$ ").split(" #")[0]


def command_of(line: str) -> str | None:
    """Return the command of `gpt-kit` that a line runs, if it does."""
    for script, command in LAUNCHERS.items():
        if script in line:
            return command
    found = re.match(r"\s*gpt-kit ([a-z]+)", line)
    return found[1] if found else None


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_use_options_that_they_have(page: Path) -> None:
    for line in shell_lines(page):
        command = command_of(line)
        if command is None:
            continue
        assert command in COMMANDS, line
        after = line.split(".py", 1)[-1] if ".py" in line else line
        unknown = set(re.findall(r"--([a-z0-9_]+)", after)) - options_of(command)
        # A mistake is shown on purpose: its message, which follows, is tested elsewhere.
        assert unknown <= {"learning_rat"}, f"{command} has no {sorted(unknown)}: {line}"


def test_the_workflow_uses_options_that_exist() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"bin/gpt-kit ([a-z]+) (.*)$", workflow, re.M)
    assert {command for command, _ in lines} == {"train", "generate", "card"}
    for command, rest in lines:
        assert set(re.findall(r"--([a-z_]+)", rest)) <= options_of(command)


# Options of other programs that the prose names: benchmarks, accelerate, torchrun, tests.
OTHERS = {
    "device",
    "no_name",
    "name",
    "cpu",
    "machine_rank",
    "kills",
    "modern",
    "rounds",
    "nproc_per_node",
}


@pytest.mark.parametrize("page", [page for page in PAGES if "benchmarks" not in page.parts], ids=ids)
def test_prose_names_options_that_exist(page: Path) -> None:
    prose = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    # Not the commands of other programs, given in backticks.
    prose = re.sub(r"`(python|accelerate|torchrun|pip|make|tensorboard|trackio)\b[^`]*`", "", prose)
    named = set(re.findall(r"--([a-z][a-z0-9_]+)", prose))
    assert named - ALL_OPTIONS - OTHERS == set()


@pytest.mark.parametrize("config", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=ids)
def test_configurations_use_options_that_exist(config: Path) -> None:
    command = "finetune" if "instructions" in config.stem else "train"
    names = set(yaml.safe_load(config.read_text(encoding="utf-8")))
    assert names <= options_of(command)
    assert set(re.findall(r"--([a-z0-9_]+)", config.read_text(encoding="utf-8"))) <= options_of(command)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.*<-])((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|md|toml))\b", text))
    places = [ROOT, ROOT / "gpt_kit_hf", page.parent]
    missing = {name for name in named if not any((place / name).exists() for place in places)} - {"RUN/README.md"}
    assert missing == set()
    folders = set(re.findall(r"`((?:[\w-]+/)+)`", text)) - {"runs/mine/", "adapter/", "site/", "dist/"}
    assert {name for name in folders if not any((place / name).is_dir() for place in places)} == set()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_blocks_compile_and_their_imports_resolve(page: Path) -> None:
    for block in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(each.name) for each in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, each.name) for each in node.names), ast.unparse(node)


def test_the_api_page_has_every_public_name_once() -> None:
    named = re.findall(r"^::: gpt_kit_hf\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(named) == len(set(named))
    # GPTModel is GPTKitForCausalLM; the other two are torch's.
    assert set(named) == set(gpt_kit_hf.__all__) - {"GPTModel", "GELU", "LayerNorm"}


def test_the_architecture_page_has_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "gpt_kit_hf"
    folders = {file.parent.relative_to(package).as_posix() for file in package.rglob("__init__.py")} - {"."}
    assert {folder for folder in folders if f"`{folder}/`" not in text} == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
