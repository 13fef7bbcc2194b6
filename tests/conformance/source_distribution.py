"""Fetches transformers' own common model tests: they are in its source distribution, not in its wheels."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


class SourceDistributionUnavailableError(Exception):
    """The package index has no source distribution of this version, or cannot be reached."""


def fetch_tests(version: str) -> Path:
    """Return the folder `tests/` of transformers' source distribution, from the cache or from the package index."""
    folder = _cache_folder() / f"transformers-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the cache's own file system, so that the rename at the end is one step: a killed run leaves no half.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incomplete-") as staging:
            unpacked = _unpack(_download(version, Path(staging)), Path(staging) / "unpacked")
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was faster: its copy is as good
                    raise
    return folder / "tests"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-kit-hf" / "conformance"


def _download(version: str, destination: Path) -> Path:
    """Let pip, with whatever index it is configured for, fetch the archive."""
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--no-binary", "transformers"]
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", destination, f"transformers=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    archives = list(destination.glob("transformers-*.tar.gz"))
    if fetched.returncode != 0 or len(archives) != 1:
        message = (fetched.stderr.strip() or "nothing").splitlines()[-1]
        raise SourceDistributionUnavailableError(
            f"needs a package index with the source distribution of transformers {version}; message of pip: {message}"
        )
    return archives[0]


def _unpack(archive: Path, destination: Path) -> Path:
    """Unpack the archive's `tests/`; return the folder that holds it."""
    top = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(f"{top}/tests/")]
        tar.extractall(destination, members=members, filter="data")
    if not (destination / top / "tests" / "test_modeling_common.py").is_file():
        raise SourceDistributionUnavailableError(f"{archive.name} holds no common model tests")
    return destination / top
