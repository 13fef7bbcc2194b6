"""A Hub on this machine's loopback for the real client, whose requests, commits and faults a test can see and plant.

It speaks what huggingface_hub sends to publish, list and download model repositories with HF_HUB_DISABLE_XET=1. It
differs from the Hub where a loopback must: a file in LFS comes from the Hub's own address and not by a redirect, and
who may not see a repository is told RepoNotFound by code, since the client reads that from a 401 on https only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import pytest
from hub_faults import Answer, Armed, Fault, Kind, Listener, Logged, Request, answer_json
from hub_store import Blob, Change, HubError, Proposal, Repository, card_metadata, is_large
from huggingface_hub import close_session

__all__ = ["CLIENT_WARNINGS", "Armed", "Fault", "HubServer", "Kind", "Logged", "hub"]

# The client uploads in a way that its HTTP library deprecates.
CLIENT_WARNINGS = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REV = r"(?P<rev>[^/]+)"


def _refused(error: HubError) -> Answer:
    headers = {"X-Error-Message": ascii(str(error))[1:-1], **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return answer_json({"error": str(error)}, error.status, headers)


@dataclass(frozen=True)
class Call:
    """A request, the objects that its address names, and its user (None is anonymous)."""

    request: Request
    names: Mapping[str, str]
    user: str | None

    def json(self) -> Any:
        return json.loads(self.request.body)


class Endpoints:
    """The endpoints of the Hub's API."""

    def __init__(self, tokens: Mapping[str, str], page_size: int) -> None:
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self._tokens = tokens
        self._page_size = page_size
        patterns: Sequence[tuple[str, str, Callable[[Call], Answer]]] = (
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/validate-yaml", self._validate_card),
            ("POST", "/api/repos/create", self._create),
            ("DELETE", "/api/repos/delete", self._delete),
            ("GET", _MODEL, self._info),
            ("GET", f"{_MODEL}/revision/{_REV}", self._info),
            ("GET", f"{_MODEL}/auth-check", self._auth_check),
            ("PUT", f"{_MODEL}/settings", self._settings),
            ("GET", f"{_MODEL}/refs", self._refs),
            ("GET", f"{_MODEL}/commits/{_REV}", self._commits),
            ("GET", rf"{_MODEL}/tree/{_REV}(?:/(?P<path>.+))?", self._tree),
            ("POST", f"{_MODEL}/paths-info/{_REV}", self._paths_info),
            ("POST", rf"{_MODEL}/branch/{_REV}", self._branch),
            ("POST", f"{_MODEL}/preupload/{_REV}", self._preupload),
            ("POST", f"{_MODEL}/commit/{_REV}", self._commit),
            ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", self._lfs_batch),
            ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", self._lfs_verify),
            ("PUT", rf"/lfs-store/{_REPO}/(?P<oid>[0-9a-f]{{64}})", self._lfs_store),
            ("GET", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", self._resolve),
            ("HEAD", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", self._resolve),
        )
        self._routes = [(method, re.compile(pattern), endpoint) for method, pattern, endpoint in patterns]

    def answer(self, request: Request) -> Answer:
        try:
            for method, pattern, endpoint in self._routes:
                if method == request.method and (found := pattern.fullmatch(request.path)):
                    names = {name: unquote(value) for name, value in found.groupdict().items() if value}
                    return endpoint(Call(request, names, self._user(request)))
            raise HubError(HTTPStatus.NOT_FOUND, f"the loopback Hub has no {request.method} {request.path}")
        except HubError as error:
            return _refused(error)

    def _user(self, request: Request) -> str | None:
        sent = request.headers.get("Authorization")
        if sent is None:
            return None
        user = self._tokens.get(sent.removeprefix("Bearer "))
        if user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        return user

    def _known(self, call: Call) -> str:
        if call.user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        return call.user

    def _repository(self, call: Call, *, write: bool = False) -> Repository:
        repository = self.repositories.get(call.names["repo"])
        if repository is None or (repository.private and call.user != repository.owner):
            # As on the Hub, what is private looks as what is missing.
            status = HTTPStatus.UNAUTHORIZED if call.user is None else HTTPStatus.NOT_FOUND
            raise HubError(status, "Repository not found", "RepoNotFound")
        if write and self._known(call) != repository.owner:
            raise HubError(HTTPStatus.FORBIDDEN, "Forbidden: pass `create_pr=1` to propose the change instead")
        return repository

    def _readable(self, call: Call) -> Repository:
        repository = self._repository(call)
        if repository.gated and call.user != repository.owner:
            status = HTTPStatus.UNAUTHORIZED if call.user is None else HTTPStatus.FORBIDDEN
            raise HubError(status, f"Access to model {repository.name} is restricted.", "GatedRepo")
        return repository

    # Accounts and repositories

    def _whoami(self, call: Call) -> Answer:
        user = self._known(call)
        access = {"displayName": "tests", "role": "write"}
        auth = {"type": "access_token", "accessToken": access}
        return answer_json({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    def _validate_card(self, call: Call) -> Answer:
        _, errors, warnings = card_metadata(call.json()["content"])
        found = {"errors": [{"message": error} for error in errors], "warnings": [{"message": w} for w in warnings]}
        return answer_json(found, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)

    def _create(self, call: Call) -> Answer:
        asked = call.json()
        user = self._known(call)
        owner = asked.get("organization") or user
        if owner != user:
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise HubError(HTTPStatus.FORBIDDEN, message)
        name = f"{owner}/{asked['name']}"
        repository = Repository(name, owner, private=asked.get("visibility") == "private")
        here = {"url": f"{self.url}/{name}", "name": name}
        if self.repositories.setdefault(name, repository) is not repository:
            return answer_json({"error": "You already created this model repo", **here}, HTTPStatus.CONFLICT)
        return answer_json(here)

    def _delete(self, call: Call) -> Answer:
        asked = call.json()
        name = f"{asked.get('organization') or call.user}/{asked['name']}"
        self._repository(Call(call.request, {"repo": name}, call.user), write=True)
        del self.repositories[name]
        return answer_json({})

    def _settings(self, call: Call) -> Answer:
        repository = self._repository(call, write=True)
        asked = call.json()
        if "visibility" in asked:
            repository.private = asked["visibility"] == "private"
        if "gated" in asked:
            repository.gated = bool(asked["gated"])
        return answer_json({})

    def _auth_check(self, call: Call) -> Answer:
        self._readable(call)
        return answer_json({})

    # What a repository holds

    def _info(self, call: Call) -> Answer:
        repository = self._repository(call)
        commit = repository.find(call.names.get("rev", "main"))
        return answer_json(repository.info(commit, detailed="blobs" in call.request.query))

    def _refs(self, call: Call) -> Answer:
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for full, commit in self._repository(call).refs().items():
            kind = "branches" if full.startswith("refs/heads/") else "pullRequests"
            name = full.removeprefix("refs/heads/").removeprefix("refs/pr/")
            answer[kind].append({"name": name, "ref": full, "targetCommit": commit})
        if "include_prs" not in call.request.query:
            del answer["pullRequests"]
        return answer_json(answer)

    def _page(self, call: Call, entries: Sequence[object]) -> Answer:
        start = int(call.request.query.get("cursor", 0))
        end = start + self._page_size
        headers = {}
        if end < len(entries):
            rest = "".join(f"&{name}={quote(value)}" for name, value in call.request.query.items() if name != "cursor")
            headers["Link"] = f'<{self.url}{call.request.path}?cursor={end}{rest}>; rel="next"'
        return answer_json(entries[start:end], headers=headers)

    def _commits(self, call: Call) -> Answer:
        history = self._repository(call).history(call.names["rev"])
        return self._page(call, [commit.entry() for commit in history])

    def _tree(self, call: Call) -> Answer:
        commit = self._repository(call).find(call.names["rev"])
        folder = call.names.get("path", "")
        files, folders = commit.files_below(folder), commit.folders_below(folder)
        if folder and not files:
            raise HubError(HTTPStatus.NOT_FOUND, f"{folder} does not exist on {commit.id}", "EntryNotFound")
        entries = [commit.folder_entry(path) for path in folders]
        entries += [blob.entry(path) for path, blob in sorted(files.items())]
        if call.request.query.get("recursive") != "true":
            entries = [entry for entry in entries if "/" not in str(entry["path"])[len(folder) :].lstrip("/")]
        return self._page(call, entries)

    def _paths_info(self, call: Call) -> Answer:
        commit = self._repository(call).find(call.names["rev"])
        entries = []
        for path in parse_qs(call.request.body.decode())["paths"]:
            if path in commit.tree:
                entries.append(commit.tree[path].entry(path))
            elif commit.files_below(path):
                entries.append(commit.folder_entry(path))
        return answer_json(entries)

    def _resolve(self, call: Call) -> Answer:
        commit = self._readable(call).find(call.names["rev"])
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        blob = commit.tree.get(call.names["path"])
        if blob is None:
            raise HubError(HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.request.headers.get("Range", ""))
        if call.request.method == "HEAD":
            return Answer(HTTPStatus.OK, b"", headers | {"Content-Length": str(blob.size)})
        if asked is None:
            return Answer(HTTPStatus.OK, blob.content, headers)
        start, end = int(asked[1]), min(int(asked[2] or blob.size), blob.size - 1)
        if start >= blob.size:
            return Answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", {"Content-Range": f"bytes */{blob.size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
        return Answer(HTTPStatus.PARTIAL_CONTENT, blob.content[start : end + 1], headers)

    # What changes a repository

    def _branch(self, call: Call) -> Answer:
        start = call.json().get("startingPoint", "main")
        self._repository(call, write=True).create_branch(call.names["rev"], start)
        return answer_json({})

    def _preupload(self, call: Call) -> Answer:
        proposes = "create_pr" in call.request.query
        commit = self._repository(call, write=not proposes).find(call.names["rev"])
        files = []
        for file in call.json()["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if known := commit.tree.get(file["path"]):
                entry["oid"] = known.etag
            files.append(entry)
        return answer_json({"files": files})

    def _lfs_batch(self, call: Call) -> Answer:
        repository = self._repository(call, write="ref" in call.json())  # a pull request names no branch
        self._known(call)
        base = f"{self.url}/{repository.name}.git/info/lfs/objects"
        objects = []
        for wanted in call.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.large:
                upload = {"href": f"{self.url}/lfs-store/{repository.name}/{wanted['oid']}?signature=made-up"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            objects.append(entry)
        return answer_json({"transfer": "basic", "objects": objects})

    def _lfs_store(self, call: Call) -> Answer:
        blob = Blob(call.request.body, lfs=True)
        if call.user is not None:
            raise HubError(HTTPStatus.BAD_REQUEST, "the store's addresses are signed: it must not see the token")
        if blob.sha256 != call.names["oid"]:
            raise HubError(HTTPStatus.BAD_REQUEST, "the content has another SHA-256 than its address")
        repository = self.repositories.get(call.names["repo"])
        if repository is None:
            raise HubError(HTTPStatus.NOT_FOUND, "the repository is gone")
        repository.large[blob.sha256] = blob.content
        return Answer(HTTPStatus.OK, headers={"ETag": f'"{blob.sha256}"'})

    def _lfs_verify(self, call: Call) -> Answer:
        asked = call.json()
        content = self._repository(call).large.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise HubError(HTTPStatus.NOT_FOUND, "the object was not uploaded")
        return answer_json({})

    def _commit(self, call: Call) -> Answer:
        proposes = "create_pr" in call.request.query
        repository = self._repository(call, write=not proposes)
        user = self._known(call)
        header, *lines = [json.loads(line) for line in call.request.body.split(b"\n") if line]
        changes = [repository.read_change(line["key"], line["value"]) for line in lines]
        about = header["value"]
        proposal = Proposal(changes, about["summary"], about["description"], user, about.get("parentCommit"))
        answer = {"success": True, "hookOutput": ""}
        if proposes:
            commit, number = repository.open_pull_request(call.names["rev"], proposal)
            answer["pullRequestUrl"] = f"{self.url}/{repository.name}/discussions/{number}"
        else:
            commit = repository.commit(call.names["rev"], proposal)
        return answer_json(
            {**answer, "commitOid": commit.id, "commitUrl": f"{self.url}/{repository.name}/commit/{commit.id}"}
        )


class HubServer:
    """A Hub with two users on 127.0.0.1, from __enter__ to __exit__; __exit__ raises what the Hub itself did wrong.

    `token` is that of "ann", who owns ann/NAME; `other_token` is that of "bob". `requests` lists what was asked, in
    the order of the answers. A listing of more than `page_size` entries comes in pages.
    """

    def __init__(self, page_size: int = 1000) -> None:
        self.token = "hf_tokenoftheloopbackhubsann"
        self.other_token = "hf_tokenoftheloopbackhubsbob"
        self._endpoints = Endpoints({self.token: "ann", self.other_token: "bob"}, page_size)
        self._listener: Listener | None = None

    def __enter__(self) -> HubServer:
        self._listener = Listener(self._endpoints.answer)
        self._endpoints.url = self.url
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        listener = self._listening
        listener.stop()
        if listener.crashes and error is None:
            raise RuntimeError("the loopback Hub failed:\n" + "\n".join(listener.crashes))

    @property
    def _listening(self) -> Listener:
        assert self._listener is not None, "the Hub serves inside `with HubServer() as hub:` only"
        return self._listener

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.server_port}"

    @property
    def requests(self) -> list[Logged]:
        return self._listening.requests

    def fail(self, fault: Fault) -> Armed:
        """Put a fault in place; what is returned counts how often it fired."""
        return self._listening.faults.add(fault)

    def clear_faults(self) -> None:
        """Take all faults away."""
        self._listening.faults.clear()

    def environment(self) -> dict[str, str]:
        """What a child process needs in its environment to speak to this Hub, as ann."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, repo: str, *, private: bool = False) -> str:
        """Make a repository as if its owner had; return its first commit."""
        repository = Repository(repo, repo.split("/")[0], private=private)
        assert self._endpoints.repositories.setdefault(repo, repository) is repository, f"{repo} exists"
        return repository.find("main").id

    def plant(
        self, repo: str, files: Mapping[str, bytes | None], revision: str = "main", message: str = "planted"
    ) -> str:
        """Commit changed and deleted (None) files as if somebody else had; return the commit."""
        changes = [
            Change(path, None if content is None else Blob(content, lfs=is_large(path, len(content))))
            for path, content in files.items()
        ]
        return self._endpoints.repositories[repo].commit(revision, Proposal(changes, message)).id

    def head(self, repo: str, revision: str = "main") -> str | None:
        """The commit that a revision names, None where there is no such revision or repository."""
        repository = self._endpoints.repositories.get(repo)
        try:
            return repository.find(revision).id if repository else None
        except HubError:
            return None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        tree = self._endpoints.repositories[repo].find(revision).tree
        return {path: blob.content for path, blob in tree.items()}

    def commits(self, repo: str, revision: str = "main") -> list[str]:
        """Newest first, to the repository's first."""
        return [commit.id for commit in self._endpoints.repositories[repo].history(revision)]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    close_session()  # what an earlier test's client keeps open leads to another Hub
    with HubServer() as server:
        yield server
        close_session()
