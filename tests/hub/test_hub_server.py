"""The loopback Hub, tested with the real client and against the rules of git and HTTP."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_server
import numpy as np
import pytest
from hub_server import Fault, HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    RepoFile,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytestmark = hub_server.CLIENT_WARNINGS
hub = hub_server.hub

REPO = "ann/model"
CARD = b"---\nlicense: mit\n---\n# A model\n"
ATTRIBUTES = ".gitattributes"  # what every new repository has


def some_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def client(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


def added(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    # Open files, since the client sends what is bytes or a path by Xet, unless its environment forbids it.
    return [CommitOperationAdd(path, io.BytesIO(content)) for path, content in files.items()]


def downloaded(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def asked(hub: HubServer) -> list[str]:
    return [f"{request.method} {request.path.split('?')[0]}" for request in hub.requests]


def send(
    hub: HubServer, method: str, path: str, body: bytes = b"", *, token: str | None = None, timeout: float = 10
) -> tuple[int, bytes]:
    """Send one request on a new connection, without retries."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=timeout)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def outcomes(count: int, action: Callable[[], object]) -> list[object]:
    def one() -> object:
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            return type(error)

    return [one() for _ in range(count)]


def test_what_is_committed_is_what_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    api = client(hub)
    url = api.create_repo(REPO)
    first = hub.head(REPO)
    assert (url, url.repo_id) == (f"{hub.url}/{REPO}", REPO)
    files = {"README.md": CARD, "sub/config.json": b"{}", "empty": b"", "model.safetensors": some_bytes(5000)}
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()

    hub.requests.clear()
    commit = api.create_commit(REPO, added(files), commit_message="all of it", parent_commit=first)
    assert asked(hub) == [
        "POST /api/validate-yaml",
        f"POST /api/models/{REPO}/preupload/main",
        f"POST /{REPO}.git/info/lfs/objects/batch",
        f"PUT /lfs-store/{REPO}/{sha256}",
        f"POST /{REPO}.git/info/lfs/objects/verify",
        f"POST /api/models/{REPO}/commit/main",
    ]
    assert [request.path for request in hub.requests if not request.had_authorization] == [hub.requests[3].path]
    assert commit.oid == hub.head(REPO)
    assert hub.commits(REPO) == [commit.oid, first]
    there = hub.files(REPO)
    assert there.pop(ATTRIBUTES)
    assert there == files

    hub.requests.clear()
    found = downloaded(api.snapshot_download(REPO, cache_dir=tmp_path))
    assert found == hub.files(REPO)
    assert asked(hub)[:2] == [f"GET /api/models/{REPO}/revision/main", f"GET /api/models/{REPO}/tree/{commit.oid}"]
    wanted = [("HEAD", path) for path in found] + [("GET", path) for path in found if path != "empty"]
    assert sorted(asked(hub)[2:]) == sorted(f"{method} /{REPO}/resolve/{commit.oid}/{path}" for method, path in wanted)


def test_names_of_blobs_are_those_of_git(hub: HubServer, tmp_path: Path) -> None:
    def git_name(content: bytes) -> str:
        command = ["git", "hash-object", "--stdin"]
        return subprocess.run(command, input=content, capture_output=True, check=True).stdout.decode().strip()

    files = {"a.txt": b"text", "b/c/weights.safetensors": some_bytes(300)}
    hub.create(REPO)
    hub.plant(REPO, files)
    entries = {entry.path: entry for entry in client(hub).list_repo_tree(REPO, recursive=True)}
    assert set(entries) == {ATTRIBUTES, *files, "b", "b/c"}
    text, weights = entries["a.txt"], entries["b/c/weights.safetensors"]
    assert isinstance(text, RepoFile)
    assert isinstance(weights, RepoFile)
    assert (text.size, text.blob_id, text.lfs) == (4, git_name(b"text"), None)
    sha256 = hashlib.sha256(files[weights.path]).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 300\n".encode()
    assert (weights.size, weights.blob_id) == (300, git_name(pointer))
    assert weights.lfs is not None
    assert (weights.lfs.sha256, weights.lfs.size, weights.lfs.pointer_size) == (sha256, 300, len(pointer))

    info = client(hub).model_info(REPO, files_metadata=True)
    siblings = {entry.rfilename: entry for entry in info.siblings or []}
    assert siblings["a.txt"].blob_id == text.blob_id
    assert siblings[weights.path].lfs == weights.lfs
    assert client(hub).get_paths_info(REPO, ["b/c", "a.txt", "none"]) == [entries["b/c"], text]
    assert [entry.path for entry in client(hub).list_repo_tree(REPO, "b")] == ["b/c"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(client(hub).list_repo_tree(REPO, "none"))


def test_unchanged_files_are_not_uploaded_again(hub: HubServer) -> None:
    files = {"README.md": CARD, "model.safetensors": some_bytes(5000)}
    hub.create(REPO)
    first = client(hub).create_commit(REPO, added(files), commit_message="first")
    hub.requests.clear()
    again = client(hub).create_commit(REPO, added(files), commit_message="again")
    assert again.oid == first.oid == hub.head(REPO)
    assert not [line for line in asked(hub) if line.startswith("PUT") or "/commit/" in line]
    assert client(hub).model_info(REPO).card_data == ModelCardData(license="mit")


def test_large_files_are_stored_in_lfs_by_size(hub: HubServer) -> None:
    hub.create(REPO)
    hub.plant(REPO, {"tokens.txt": b"\0" * (10 * 2**20 + 1), "small.txt": b"\0" * (10 * 2**20)})
    large, small = client(hub).get_paths_info(REPO, ["tokens.txt", "small.txt"])
    assert isinstance(large, RepoFile)
    assert isinstance(small, RepoFile)
    assert large.lfs is not None
    assert small.lfs is None


def test_a_commit_on_another_parent_is_refused(hub: HubServer) -> None:
    parent = hub.create(REPO)
    head = hub.plant(REPO, {"a.txt": b"somebody else's"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        client(hub).create_commit(REPO, added({"b.txt": b"mine"}), commit_message="mine", parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert hub.commits(REPO) == [head, parent]
    done = client(hub).create_commit(REPO, added({"b.txt": b"mine"}), commit_message="mine", parent_commit=head)
    assert hub.commits(REPO) == [done.oid, head, parent]


def test_one_of_concurrent_commits_on_one_parent_is_accepted(hub: HubServer) -> None:
    parent = hub.create(REPO)

    def commit(number: int) -> int:
        operations = added({f"{number}.txt": b"mine"})
        try:
            client(hub).create_commit(REPO, operations, commit_message=f"{number}", parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(commit, range(6))) == [200] + [412] * 5
    assert len(hub.commits(REPO)) == 2


def test_concurrent_commits_without_a_parent_are_all_accepted(hub: HubServer) -> None:
    hub.create(REPO)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # or the threads would take turns
    try:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda number: hub.plant(REPO, {f"{number}.txt": b""}), range(100)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(made) == sorted(hub.commits(REPO)[:-1])
    assert set(hub.files(REPO)) == {ATTRIBUTES, *(f"{number}.txt" for number in range(100))}


def test_files_and_folders_are_deleted(hub: HubServer) -> None:
    hub.create(REPO)
    before = hub.plant(REPO, {"a.txt": b"a", "sub/b.txt": b"b", "sub/c/d.txt": b"d", "subway.txt": b"e"})
    gone = [CommitOperationDelete("a.txt"), CommitOperationDelete("sub/")]
    client(hub).create_commit(REPO, gone, commit_message="less")
    assert set(hub.files(REPO)) == {ATTRIBUTES, "subway.txt"}
    assert set(hub.files(REPO, before)) == {ATTRIBUTES, "a.txt", "sub/b.txt", "sub/c/d.txt", "subway.txt"}
    head = hub.plant(REPO, {"subway.txt": None})
    assert set(hub.files(REPO)) == {ATTRIBUTES}
    with pytest.raises(EntryNotFoundError):
        client(hub).create_commit(REPO, [CommitOperationDelete("subway.txt")], commit_message="again")
    assert hub.head(REPO) == head


def test_a_commit_moves_one_branch_only(hub: HubServer, tmp_path: Path) -> None:
    api = client(hub)
    first = hub.create(REPO)
    second = hub.plant(REPO, {"a.txt": b"main"})
    api.create_branch(REPO, branch="feature/x", revision=first)
    assert hub.head(REPO, "feature/x") == first
    files = {"a.txt": b"branch", "w.safetensors": some_bytes(100)}
    commit = api.create_commit(REPO, added(files), commit_message="b", revision="feature/x")
    assert (hub.head(REPO), hub.commits(REPO, "feature/x")) == (second, [commit.oid, first])
    assert downloaded(api.snapshot_download(REPO, revision="feature/x", cache_dir=tmp_path))["a.txt"] == b"branch"
    assert {branch.name: branch.target_commit for branch in api.list_repo_refs(REPO).branches} == {
        "main": second,
        "feature/x": commit.oid,
    }
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="feature/x")
    api.create_branch(REPO, branch="feature/x", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, added({"a": b""}), commit_message="a", revision="none")
    assert hub.head(REPO, "none") is None


def test_a_pull_request_is_a_reference_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    first = hub.create(REPO)
    bob = HfApi(endpoint=hub.url, token=hub.other_token)
    files = {"w.safetensors": some_bytes(100)}
    with pytest.raises(HfHubHTTPError) as refused:
        bob.create_commit(REPO, added(files), commit_message="mine")
    assert refused.value.response.status_code == 403
    proposed = bob.create_commit(REPO, added(files), commit_message="mine", create_pr=True)
    assert (proposed.pr_revision, proposed.pr_num) == ("refs/pr/1", 1)
    assert (hub.head(REPO), hub.commits(REPO, "refs/pr/1")) == (first, [proposed.oid, first])
    assert "w.safetensors" in downloaded(bob.snapshot_download(REPO, revision="refs/pr/1", cache_dir=tmp_path))
    more = client(hub).create_commit(REPO, added({"a": b"a"}), commit_message="more", revision="refs/pr/1")
    hub.plant(REPO, {"c": b"c"})
    operations = added({"b": b"b"})
    second = bob.create_commit(REPO, operations, commit_message="b", create_pr=True, parent_commit=first)
    assert (second.pr_num, hub.commits(REPO, "refs/pr/2")) == (2, [second.oid, first])
    requests = client(hub).list_repo_refs(REPO, include_pull_requests=True).pull_requests or []
    assert {request.ref: request.target_commit for request in requests} == {
        "refs/pr/1": more.oid,
        "refs/pr/2": second.oid,
    }


def test_a_private_repository_looks_like_a_missing_one(hub: HubServer, tmp_path: Path) -> None:
    api = client(hub)
    api.create_repo(REPO, private=True)
    hub.plant(REPO, {"a.txt": b"a"})
    for token in (False, hub.other_token):
        other = HfApi(endpoint=hub.url, token=token)
        for repo in (REPO, "ann/none"):
            with pytest.raises(RepositoryNotFoundError):
                other.model_info(repo)
            with pytest.raises(RepositoryNotFoundError):
                other.snapshot_download(repo, cache_dir=tmp_path)
            with pytest.raises(RepositoryNotFoundError):
                other.create_commit(repo, added({"a": b""}), commit_message="a")
        assert not other.repo_exists(REPO)
    assert downloaded(api.snapshot_download(REPO, cache_dir=tmp_path))["a.txt"] == b"a"
    assert api.model_info(REPO).private
    api.update_repo_settings(REPO, private=False)
    assert HfApi(endpoint=hub.url, token=False).repo_exists(REPO)


def test_a_gated_repository_has_its_own_error(hub: HubServer, tmp_path: Path) -> None:
    hub.create(REPO)
    hub.plant(REPO, {"a.txt": b"a"})
    client(hub).update_repo_settings(REPO, gated="auto")
    for token in (False, hub.other_token):
        with pytest.raises(GatedRepoError):
            HfApi(endpoint=hub.url, token=token).hf_hub_download(REPO, "a.txt", cache_dir=tmp_path)
    assert Path(client(hub).hf_hub_download(REPO, "a.txt", cache_dir=tmp_path)).read_bytes() == b"a"


def test_what_is_missing_has_its_own_error(hub: HubServer, tmp_path: Path) -> None:
    api = client(hub)
    hub.create(REPO)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, ATTRIBUTES, revision="none", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.snapshot_download(REPO, revision="0" * 40, cache_dir=tmp_path)
    assert not api.file_exists(REPO, "none.json")
    assert api.file_exists(REPO, ATTRIBUTES)


def test_accounts_and_repositories(hub: HubServer) -> None:
    api = client(hub)
    assert (api.whoami()["name"], HfApi(endpoint=hub.url, token=hub.other_token).whoami()["name"]) == ("ann", "bob")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_unknown").whoami()
    hub.create("bob/public")
    assert api.repo_exists("bob/public")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.url, token="hf_unknown").model_info("bob/public")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo("bob/model")
    assert refused.value.response.status_code == 403
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.auth_check(REPO)
    api.delete_repo(REPO)
    assert (hub.head(REPO), api.repo_exists(REPO)) == (None, False)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


def test_long_listings_come_in_pages() -> None:
    with HubServer(page_size=3) as server:
        server.create(REPO)
        for number in range(7):
            server.plant(REPO, {f"{number}.txt": b""}, message=f"number {number}")
        api = client(server)
        assert sorted(api.list_repo_files(REPO)) == sorted(server.files(REPO))
        server.requests.clear()
        assert sorted(entry.path for entry in api.list_repo_tree(REPO)) == sorted(server.files(REPO))
        assert len(server.requests) == 3  # 8 files
        history = api.list_repo_commits(REPO)
        assert [commit.commit_id for commit in history] == server.commits(REPO)
        assert [commit.title for commit in history] == [
            *(f"number {number}" for number in range(6, -1, -1)),
            "initial commit",
        ]


def test_cards_are_validated_before_anything_is_uploaded(hub: HubServer) -> None:
    head = hub.create(REPO)
    bad = {
        "---\n- a list\n---\n": "mapping",
        "---\nlicense: [mit\n---\n": "YAML",
        "---\nmodel-index:\n- results: []\n---\n": "model-index",
        "---\nmodel-index:\n- name: a\n  results:\n  - metrics: [{type: loss}]\n---\n": "model-index",
    }
    for card, message in bad.items():
        with pytest.raises(ValueError, match=message):
            client(hub).create_commit(REPO, added({"README.md": card.encode()}), commit_message="card")
    assert set(asked(hub)) == {"POST /api/validate-yaml"}
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        client(hub).create_commit(REPO, added({"README.md": b"# No metadata"}), commit_message="card")
    assert hub.commits(REPO)[1:] == [head]
    # What the client itself writes is right.
    result = EvalResult("text-generation", "text", "words", "bits_per_byte", 1.25)
    right = ModelCard(
        f"---\n{ModelCardData(license='mit', model_name='a', eval_results=[result]).to_yaml()}\n---\n# A"
    )
    client(hub).create_commit(REPO, added({"README.md": str(right).encode()}), commit_message="card")
    assert client(hub).model_info(REPO).card_data == right.data


def test_a_cut_download_is_resumed(hub: HubServer, tmp_path: Path) -> None:
    hub.create(REPO)
    hub.plant(REPO, {"w.safetensors": some_bytes(21 * 2**20)})  # the client keeps whole pieces of 10 MiB
    cut = hub.fail(Fault("GET", r"resolve/.*\.safetensors", "truncate"))
    assert downloaded(client(hub).snapshot_download(REPO, cache_dir=tmp_path)) == hub.files(REPO)
    assert cut.fired == 1
    assert [r.status for r in hub.requests if r.method == "GET" and "safetensors" in r.path] == [200, 206]


def test_the_client_does_not_detect_a_flipped_bit(hub: HubServer, tmp_path: Path) -> None:
    """The reason why downloads are checked by SHA-256."""
    weights = some_bytes(1000)
    hub.create(REPO)
    hub.plant(REPO, {"w.safetensors": weights})
    hub.fail(Fault("GET", "w.safetensors", "flip"))
    found = downloaded(client(hub).snapshot_download(REPO, cache_dir=tmp_path))["w.safetensors"]
    assert np.unpackbits(np.frombuffer(found, np.uint8) ^ np.frombuffer(weights, np.uint8)).sum() == 1


@pytest.mark.parametrize("kind", ["status", "drop", "cut_upload"])
def test_a_commit_that_fails_before_it_is_done_leaves_the_head(hub: HubServer, kind: hub_server.Kind) -> None:
    head = hub.create(REPO)
    fault = hub.fail(Fault("POST", "/commit/main", kind))
    operations = added({"a.txt": some_bytes(100_000)})
    with pytest.raises(Exception, match=r"503|disconnected|reset|Broken pipe"):
        client(hub).create_commit(REPO, operations, commit_message="a")
    assert (fault.seen, fault.fired, hub.commits(REPO)) == (1, 1, [head])  # the client does not try again
    client(hub).create_commit(REPO, operations, commit_message="a")
    assert set(hub.files(REPO)) == {ATTRIBUTES, "a.txt"}


def test_a_commit_whose_response_is_lost_exists(hub: HubServer) -> None:
    head = hub.create(REPO)
    fault = hub.fail(Fault("POST", "/commit/main", "lose_answer"))
    with pytest.raises(Exception, match="disconnected"):
        client(hub).create_commit(REPO, added({"a.txt": b"a"}), commit_message="a")
    assert (fault.seen, fault.fired, hub.commits(REPO)[1:]) == (1, 1, [head])
    assert hub.files(REPO)["a.txt"] == b"a"


@pytest.mark.parametrize("kind", ["status", "cut_upload", "lose_answer"])
def test_a_failed_upload_is_retried(hub: HubServer, kind: hub_server.Kind) -> None:
    hub.create(REPO)
    fault = hub.fail(Fault("PUT", "/lfs-store/", kind))
    files = {"w.safetensors": some_bytes(2**20)}
    client(hub).create_commit(REPO, added(files), commit_message="w")
    assert (fault.seen, fault.fired, hub.files(REPO)["w.safetensors"]) == (2, 1, files["w.safetensors"])
    assert [request.status for request in hub.requests if request.method == "PUT"] == [
        503 if kind == "status" else 0,
        200,
    ]


def test_the_blob_store_refuses_a_request_with_a_token(hub: HubServer) -> None:
    hub.create(REPO)
    content = some_bytes(10)
    address = f"/lfs-store/{REPO}/{hashlib.sha256(content).hexdigest()}"
    assert send(hub, "PUT", address, content, token=hub.token)[0] == 400
    assert send(hub, "PUT", address, content + b"!")[0] == 400
    assert send(hub, "PUT", address, content)[0] == 200


WORD = b"the word"
FLIPPED = b"the\x20vord"


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("status", (418, b'{"error": "a fault that the test asked for"}')),
        ("drop", http.client.RemoteDisconnected),
        ("lose_answer", http.client.RemoteDisconnected),
        ("truncate", http.client.IncompleteRead),
        ("reset", ConnectionResetError),
        ("flip", (200, FLIPPED)),
        ("delay", TimeoutError),
    ],
)
def test_a_fault_fires_the_given_number_of_times(hub: HubServer, kind: hub_server.Kind, outcome: object) -> None:
    hub.create(REPO)
    hub.plant(REPO, {"word.txt": WORD, "other.txt": WORD})
    seconds = 60.0 if kind == "delay" else 0.0
    fault = hub.fail(Fault("GET", r"word\.txt$", kind, status=418, times=2, skip=1, seconds=seconds))
    timeout = 0.2 if kind == "delay" else 10.0
    good = (200, WORD)
    got = outcomes(5, lambda: send(hub, "GET", f"/{REPO}/resolve/main/word.txt", timeout=timeout))
    assert got == [good, outcome, outcome, good, good]
    assert send(hub, "GET", f"/{REPO}/resolve/main/other.txt") == good
    assert (fault.seen, fault.fired) == (5, 2)
    lost = kind in ("drop", "lose_answer")
    if kind != "delay":  # its requests are answered when the Hub stops
        bad = 418 if kind == "status" else 0 if lost else 200
        assert [request.status for request in hub.requests] == [200, bad, bad, 200, 200, 200]


@pytest.mark.parametrize("kind", ["status", "drop", "cut_upload", "lose_answer"])
def test_only_a_request_with_a_lost_response_has_an_effect(hub: HubServer, kind: hub_server.Kind) -> None:
    hub.create(REPO)
    fault = hub.fail(Fault("POST", "/branch/", kind, times=3))
    path = f"/api/models/{REPO}/branch/new"
    for _ in range(3):
        outcomes(1, lambda: send(hub, "POST", path, b"{}", token=hub.token))
        assert (hub.head(REPO, "new") is not None) == (kind == "lose_answer")
    assert fault.fired == 3
    assert send(hub, "POST", path, b"{}", token=hub.token)[0] == (409 if kind == "lose_answer" else 200)
    assert fault.fired == 3


def test_the_first_fault_that_is_due_fires(hub: HubServer) -> None:
    first, second = hub.fail(Fault("GET", "whoami", "status", status=500)), hub.fail(Fault("GET", "who", "status"))
    got = outcomes(3, lambda: send(hub, "GET", "/api/whoami-v2", token=hub.token)[0])
    assert got == [500, 503, 200]
    assert (first.seen, first.fired, second.seen, second.fired) == (3, 1, 3, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "explode"},
        {"method": "get"},
        {"times": 0},
        {"skip": -1},
        {"kind": "delay"},
        {"seconds": 1.0},
        {"method": "HEAD", "kind": "flip"},
    ],
)
def test_a_fault_that_could_never_fire_is_refused(wrong: dict[str, object]) -> None:
    right: dict[str, object] = {"method": "GET", "path": "", "kind": "drop"}
    Fault(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fault|HEAD|delay"):
        Fault(**{**right, **wrong})  # type: ignore[arg-type]


def test_a_hub_that_is_down_is_not_an_empty_hub(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with HubServer() as server:
        server.create(REPO)
        url = server.url
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", f"/api/models/{REPO}")
        assert connection.getresponse().read()  # and the connection stays open
    connection.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(REPO, endpoint=url, token=False, cache_dir=tmp_path)


def test_an_error_of_the_test_server_itself_is_raised() -> None:
    with pytest.raises(RuntimeError, match="JSONDecodeError"), HubServer() as server:
        assert send(server, "POST", "/api/repos/create", b"no JSON", token=server.token)[0] == 500


CHILD = """
import sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, create_commit, create_repo, snapshot_download, upload_folder

repo, folder = create_repo("model").repo_id, Path(sys.argv[1])
operations = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
commit = create_commit(repo, operations, commit_message="from a child")
upload_folder(repo_id=repo, folder_path=folder, path_in_repo="again", parent_commit=commit.oid)
print(repo, commit.oid, snapshot_download(repo, revision=commit.oid))
"""


def test_a_child_process_needs_only_the_environment(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    files = {"model.safetensors": some_bytes(3000), "vocab.bin": some_bytes(10, seed=1), "config.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "home")}
    command: Sequence[str | Path] = [sys.executable, "-c", CHILD, folder]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    repo, commit, snapshot = child.stdout.split()
    assert (repo, hub.commits(REPO)[1]) == (REPO, commit)
    assert downloaded(snapshot) == {**files, ATTRIBUTES: hub.files(REPO)[ATTRIBUTES]}
    assert hub.files(REPO) == downloaded(snapshot) | {f"again/{name}": content for name, content in files.items()}
    assert all(request.had_authorization for request in hub.requests if request.method != "PUT")
