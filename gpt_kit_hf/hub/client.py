"""The Hub's client: its errors as `HubError`, and downloads in which the digest of every file is checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    # The base class of the HTTP library: httpx with huggingface_hub 1, httpx2 since huggingface_hub 2.
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gpt_kit_hf.errors import GPTKitError, HubError
from gpt_kit_hf.hub.secret_scan import first_line
from gpt_kit_hf.storage.digests import digest_of, git_digest_of
from gpt_kit_hf.storage.run_folder import EVENTS_PREFIX

# Pickles and other repositories' code are not downloaded.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "*.png")
# What the model does not need: its code for machines without this package, and the curves that the Hub shows.
OTHER_FILES = ("*.py", f"{EVENTS_PREFIX}*")

# Reason and next step by exception class; the first that matches counts. `{error}` is the client's own message.
_REASONS: dict[type[Exception], str] = {
    HFValidationError: "{error}: name it OWNER/NAME, of letters, digits, '-', '_' and '.'",
    LocalTokenNotFoundError: "you are not logged in: run `hf auth login`, or set HF_TOKEN",
    GatedRepoError: "the repository is gated: request access on its page, and log in",
    RepositoryNotFoundError: "there is no such repository, or your account may not see it: check the name, and log in "
    "(`hf auth login`)",
    RevisionNotFoundError: "there is no such branch, tag or commit: see the repository's page",
    EntryNotFoundError: "a file is missing on the Hub ({error}): push again",
}
_NOT_REACHED = (IncompleteSnapshotError, LocalEntryNotFoundError, OfflineModeIsEnabled)
_STATUS_REASONS = {
    401: "your token is not valid: run `hf auth login`, or set HF_TOKEN to a valid one",
    403: "your token has no write access to this repository: create one that has",
    409: "the repository was changed by somebody else meanwhile: review that change, and run the same command again",
    412: "the repository was changed by somebody else meanwhile: review that change, and run the same command again",
    429: "the Hub's rate limit is reached: run the same command again in some minutes",
}


@contextmanager
def hub_errors(failure: str) -> Iterator[None]:
    """Raise HubError for any exception of the Hub's client: one line with `failure`, its reason and the next step."""
    try:
        yield
    except GPTKitError:
        raise
    # The client raises plain OSError, RuntimeError or ValueError where a download has another size than announced.
    except (HTTPError, EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{failure}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    first = first_line(error)
    if isinstance(error, _NOT_REACHED):
        if is_offline_mode():
            return "the Hub was not asked, as HF_HUB_OFFLINE is set, and the cache does not hold it: unset that"
        first = first.removeprefix("Got: ")
        return f"the Hub was not reached ({first}), and the cache does not hold it: run the same command again"
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return reason.format(error=first)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        answered = f"the Hub answered {status or first}: run the same command again"
        return _STATUS_REASONS.get(status, answered) if status else answered
    return f"the network failed ({first}): run the same command again"


def fetch_model(
    repo: str,
    *,
    revision: str | None = None,
    with_code: bool = False,
    cache_dir: Path | None = None,
    api: HfApi | None = None,
) -> Path:
    """Return the snapshot folder of a repository's model in the Hub's cache, every file checked; no code is run.

    The Hub's client compares sizes only. Here each file's digest is computed and compared with the Hub's: SHA-256 for
    large files, git's SHA-1 for others. A file that differs is removed from the cache, so that the next call downloads
    it again. Without a network the cached files are checked. Raises HubError.
    """
    with hub_errors(f"{repo} was not fetched"):
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*MODEL_FILES, *(OTHER_FILES if with_code else ())],
                cache_dir=cache_dir,
                endpoint=None if api is None else api.endpoint,
                token=None if api is None else api.token,
            )
        )
    check_blobs(folder, repo)
    return folder


def check_blobs(folder: Path, repo: str) -> None:
    """Raise HubError unless each file of a cached snapshot has the digest that its blob is named by."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        blob = path.resolve()
        # In a cache without symlinks a file is no blob and has no digest for a name.
        if blob != path.absolute() and _digest_like(blob.name, blob) != blob.name:
            blob.unlink()
            path.unlink()
            raise HubError(
                f"{repo} was not fetched: the digest of {path.name} is not the one that the Hub announced; the file "
                "was removed from the cache: run the same command again"
            )


def _digest_like(name: str, blob: Path) -> str:
    """Return the file's digest of the kind that `name` has, or `name` if it is no digest."""
    if re.fullmatch("[0-9a-f]{64}", name):
        return digest_of(blob).sha256
    return git_digest_of(blob) if re.fullmatch("[0-9a-f]{40}", name) else name
