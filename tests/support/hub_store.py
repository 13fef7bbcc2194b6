"""The storage of the loopback Hub: repositories of immutable commits, and large files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any

import yaml

_LARGE = 10 * 2**20
# The endings that a new repository's .gitattributes hands to LFS; the ones that a model repository may hold.
_LARGE_ENDINGS = (
    *(".bin", ".ckpt", ".gz", ".h5", ".npy", ".npz", ".onnx", ".parquet", ".pkl", ".pt", ".pth", ".safetensors"),
    *(".tar", ".zip"),
)
_ATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in _LARGE_ENDINGS).encode()
_METADATA = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


class HubError(Exception):
    """A refused request: the status, a message, and the error code that the client maps to an exception class."""

    def __init__(
        self, status: HTTPStatus, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


@dataclass(frozen=True)
class Blob:
    """One file's content; an LFS file has a pointer in git and its content beside."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Git's own name of the blob: of the pointer where the file is in LFS."""
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, object]:
        """The file in the answer to a listing of a folder."""
        entry: dict[str, object] = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return entry

    def sibling(self, path: str, *, detailed: bool) -> dict[str, object]:
        """The file in the answer to a question about its repository."""
        entry: dict[str, object] = {"rfilename": path}
        if detailed:
            entry |= {"blobId": self.oid, "size": self.size}
        if detailed and self.lfs:
            entry["lfs"] = {"sha256": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    tree: Mapping[str, Blob]
    title: str
    description: str
    author: str
    date: datetime

    def files_below(self, folder: str) -> dict[str, Blob]:
        return {path: blob for path, blob in self.tree.items() if not folder or path.startswith(folder + "/")}

    def folders_below(self, folder: str) -> list[str]:
        parents = {str(parent) for path in self.files_below(folder) for parent in PurePosixPath(path).parents}
        return sorted(parent for parent in parents - {"."} if not folder or parent.startswith(folder + "/"))

    def folder_entry(self, folder: str) -> dict[str, object]:
        oid = _digest([[path, blob.oid] for path, blob in sorted(self.files_below(folder).items())])
        return {"type": "directory", "path": folder, "oid": oid, "size": 0}

    def entry(self) -> dict[str, object]:
        """The commit in the answer to a question about its branch."""
        authors = [{"user": self.author}]
        return {"id": self.id, "title": self.title, "message": self.description, "authors": authors, "date": self.time}

    @property
    def time(self) -> str:
        return self.date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Change:
    """A change of one path: a file's new content, its deletion (blob None), or the deletion of a folder."""

    path: str
    blob: Blob | None
    folder: bool = False


@dataclass(frozen=True)
class Proposal:
    """A requested commit; `parent` is the head that it expects."""

    changes: Sequence[Change]
    title: str
    description: str = ""
    author: str = "ann"
    parent: str | None = None


def _digest(value: object) -> str:
    return hashlib.sha1(json.dumps(value).encode()).hexdigest()


def is_large(path: str, size: int) -> bool:
    """Return whether the Hub stores a file in LFS, by its suffix or its size."""
    return size > _LARGE or path.endswith(_LARGE_ENDINGS)


def card_metadata(content: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return a card's metadata, their errors and their warnings."""
    found = _METADATA.match(content)
    if found is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML Exception: {error}"], []
    if not isinstance(metadata, dict):
        return {}, ["the metadata must be a mapping"], []
    index = metadata.get("model-index", [])
    if not isinstance(index, list) or not all(isinstance(item, dict) and _is_indexed(item) for item in index):
        return {}, ['"model-index" must list models with name and results: task, dataset, metrics'], []
    return metadata, [], []


def _is_indexed(model: Mapping[str, Any]) -> bool:
    try:
        results = [
            (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"], metric["type"])
            for result in model["results"]
            for metric in result["metrics"]
        ]
    except (KeyError, TypeError):
        return False
    return "name" in model and all(isinstance(word, str) for words in results for word in words)


def _apply(tree: Mapping[str, Blob], changes: Sequence[Change]) -> dict[str, Blob]:
    result = dict(tree)
    for change in changes:
        if change.blob is not None:
            result[change.path] = change.blob
            continue
        gone = [path for path in result if path.startswith(change.path.rstrip("/") + "/")]
        if not change.folder:
            gone = [change.path] if change.path in result else []
        if not gone:
            raise HubError(
                HTTPStatus.NOT_FOUND, f"A file with this name doesn't exist: {change.path}", "EntryNotFound"
            )
        for path in gone:
            del result[path]
    return result


class Repository:
    """Branches and pull requests over immutable commits; every write is atomic."""

    def __init__(self, name: str, owner: str, *, private: bool) -> None:
        self.name = name
        self.owner = owner
        self.private = private
        self.gated = False
        self.large: dict[str, bytes] = {}  # sha256 -> content
        self._lock = threading.RLock()
        self._commits: dict[str, Commit] = {}
        first = self._write(None, Proposal([Change(".gitattributes", Blob(_ATTRIBUTES, lfs=False))], "initial commit"))
        self._refs = {"refs/heads/main": first.id}

    def _write(self, parent: Commit | None, proposal: Proposal) -> Commit:
        tree = _apply(parent.tree if parent else {}, proposal.changes)
        listing = sorted((path, blob.oid) for path, blob in tree.items())
        # No time in it: what a test does gives the same ids each time.
        before = None if parent is None else parent.id
        name = _digest([before, listing, proposal.title, proposal.description, proposal.author])
        commit = Commit(
            id=name,
            parent=before,
            tree=tree,
            title=proposal.title,
            description=proposal.description,
            author=proposal.author,
            date=datetime.now(timezone.utc),
        )
        return self._commits.setdefault(name, commit)

    def refs(self) -> dict[str, str]:
        """Full name -> commit: refs/heads/NAME and refs/pr/N."""
        with self._lock:
            return dict(self._refs)

    def _reference(self, revision: str) -> str | None:
        return next((name for name in (f"refs/heads/{revision}", revision) if name in self._refs), None)

    def find(self, revision: str) -> Commit:
        """The commit that a branch, refs/pr/N, or (the beginning of) a commit's id names."""
        with self._lock:
            if name := self._reference(revision):
                return self._commits[self._refs[name]]
            known = [commit for commit in self._commits.values() if commit.id.startswith(revision)]
        if len(known) != 1 or not re.fullmatch("[0-9a-f]{5,40}", revision):
            raise HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[0]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits = [self.find(revision)]
        while commits[-1].parent is not None:
            commits.append(self._commits[commits[-1].parent])
        return commits

    def commit(self, revision: str, proposal: Proposal) -> Commit:
        with self._lock:
            reference = self._reference(revision)
            if reference is None:  # a commit's id is no place to write to, either
                raise HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = self._commits[self._refs[reference]]
            if proposal.parent is not None and not head.id.startswith(proposal.parent.lower()):
                message = "A commit has happened since. Please refresh and try again."
                raise HubError(HTTPStatus.PRECONDITION_FAILED, message)
            new = self._write(head, proposal)
            self._refs[reference] = new.id
            return new

    def open_pull_request(self, revision: str, proposal: Proposal) -> tuple[Commit, int]:
        with self._lock:
            new = self._write(self.find(proposal.parent or revision), proposal)
            number = 1 + sum(name.startswith("refs/pr/") for name in self._refs)
            self._refs[f"refs/pr/{number}"] = new.id
            return new, number

    def create_branch(self, name: str, start: str) -> None:
        with self._lock:
            if name.startswith("refs/"):
                raise HubError(HTTPStatus.BAD_REQUEST, f"Invalid reference for a branch: {name}")
            if f"refs/heads/{name}" in self._refs:
                raise HubError(HTTPStatus.CONFLICT, f"Reference already exists: refs/heads/{name}")
            self._refs[f"refs/heads/{name}"] = self.find(start).id

    def read_change(self, key: str, value: Mapping[str, Any]) -> Change:
        """One line of what the client commits; an LFS file must have been uploaded before."""
        path = value["path"]
        if key in ("deletedFile", "deletedFolder"):
            return Change(path, None, folder=key == "deletedFolder")
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > _LARGE:
                raise HubError(HTTPStatus.BAD_REQUEST, f"{path} is too large for a regular file")
            return Change(path, Blob(content, lfs=False))
        if key != "lfsFile" or value["oid"] not in self.large:
            message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            raise HubError(HTTPStatus.BAD_REQUEST, message)
        return Change(path, Blob(self.large[value["oid"]], lfs=True))

    def info(self, commit: Commit, *, detailed: bool) -> dict[str, object]:
        card = commit.tree.get("README.md")
        return {
            "id": self.name,
            "modelId": self.name,
            "author": self.owner,
            "sha": commit.id,
            "lastModified": commit.time,
            "createdAt": self.history("main")[-1].time,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": card_metadata(card.content.decode())[0] if card else {},
            "siblings": [blob.sibling(path, detailed=detailed) for path, blob in sorted(commit.tree.items())],
        }
