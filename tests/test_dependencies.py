"""pyproject.toml against what the package imports."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Installed for those who work on this package, not for those who use it.
_DEVELOPMENT = {"docs", "test"}


def canonical(name: str) -> str:
    """The name of a distribution as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[name] for name in extras.keys() - _DEVELOPMENT)]
    return {canonical(re.split(r"[^\w.-]", requirement)[0]) for each in lists for requirement in each}


def imported(file: Path) -> set[str]:
    """The top-level names of all modules that a file imports, also within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_what_is_imported_is_declared() -> None:
    found: dict[str, set[str]] = {}
    for file in (ROOT / "gpt_kit_hf").rglob("*.py"):
        for name in imported(file) - sys.stdlib_module_names - {"gpt_kit_hf"}:
            found.setdefault(name, set()).add(file.relative_to(ROOT).as_posix())
    assert {"torch", "yaml", "matplotlib"} <= found.keys()
    distributions, known = packages_distributions(), declared()
    missing = {
        name: sorted(files)
        for name, files in found.items()
        if not known & {canonical(each) for each in distributions.get(name, [name])}
    }
    assert missing == {}
