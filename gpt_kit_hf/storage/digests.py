"""Digests of files: SHA-256, and git's own, by which the Hub names small files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from gpt_kit_hf.storage.atomic_files import update_digest


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


def digest_of(path: Path) -> FileDigest:
    """Return the size and SHA-256 of a file."""
    digest = hashlib.sha256()
    update_digest(digest, path)
    return FileDigest(size=path.stat().st_size, sha256=digest.hexdigest())


def git_digest_of(path: Path) -> str:
    """Return the SHA-1 of a file as a git blob."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    update_digest(digest, path)
    return digest.hexdigest()
