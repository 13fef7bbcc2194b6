"""Talking to the Hub: its errors as one kind, and downloads of which every byte is checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gpt_kit_hf.errors import GPTKitError, HubError
from gpt_kit_hf.hub.secret_scan import hide_secrets
from gpt_kit_hf.storage.digests import digest_of, git_digest_of

# What a model is made of; pickles, pictures and others' code are not fetched.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "*.png")
CODE_FILES = ("*.py",)

# The HTTP library's own error, of which the client's is one; which library that is differs between versions.
_NetworkError: type[Exception] = HfHubHTTPError.__mro__[1]


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Raise HubError, one sentence that says what failed and what to do, for whatever the client of the Hub raises."""
    try:
        yield
    except GPTKitError:
        raise
    except HFValidationError as error:
        raise HubError(f"{doing}: {_first(error)}: name it OWNER/NAME, of letters, digits, '-', '_' and '.'") from None
    except LocalTokenNotFoundError:
        raise HubError(f"{doing}: you are not logged in: run `hf auth login`, or set HF_TOKEN") from None
    except GatedRepoError:
        raise HubError(f"{doing}: access is given by its owner only: ask on its page, and log in") from None
    except RepositoryNotFoundError as error:
        raise HubError(f"{doing}: {_not_found(error)}") from None
    except RevisionNotFoundError:
        raise HubError(f"{doing}: there is no such branch, tag or commit: look at the repository's page") from None
    except (IncompleteSnapshotError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = f"the Hub cannot be reached and the cache does not hold it ({_first(error)})"
        raise HubError(f"{doing}: {why}: run the same command again") from None
    except EntryNotFoundError as error:
        raise HubError(f"{doing}: a file is missing on the Hub ({_first(error)}): push again") from None
    except HfHubHTTPError as error:
        raise HubError(f"{doing}: {_of_status(error)}") from None
    except (_NetworkError, OSError, RuntimeError, ValueError) as error:
        # The client raises plain ones where a download has another size than was announced.
        raise HubError(f"{doing}: the network failed ({_first(error)}): run the same command again") from None


def _of_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return "your token is not valid: run `hf auth login`, or set HF_TOKEN to another"
    if status == 403:
        return "your token may not do this: make one that may write to this repository"
    if status in (409, 412):
        return "someone else has written to it meanwhile: look at what changed, and run the same command again"
    if status == 429:
        return "the Hub asks to wait: run the same command again in some minutes"
    return f"the Hub answered {status or _first(error)}: run the same command again"


def _not_found(error: RepositoryNotFoundError) -> str:
    if error.response is not None and error.response.status_code == 401:
        return "there is no such repository, or you may not see it: check the name, and log in (`hf auth login`)"
    return "there is no such repository: check the name"


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return hide_secrets(re.sub(r"\s+", " ", lines[0]))[:200] if lines else type(error).__name__


def fetch_model(
    repo: str,
    *,
    revision: str | None = None,
    with_code: bool = False,
    cache_dir: Path | None = None,
    api: HfApi | None = None,
) -> Path:
    """Return the folder in the Hub's cache that holds a repository's model, every byte checked; nothing is run.

    The client of the Hub compares sizes only. Here each file's digest is computed again and compared with the one
    that the Hub gives for it: SHA-256 for large files, git's SHA-1 for others. A file that differs is taken out of
    the cache, so that the next attempt fetches it anew. Without a network what the cache holds is checked.
    Raises HubError.
    """
    patterns = [*MODEL_FILES, *(CODE_FILES if with_code else ())]
    with hub_errors(f"{repo} was not fetched"):
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                cache_dir=cache_dir,
                endpoint=None if api is None else api.endpoint,
                token=None if api is None else api.token,
            )
        )
    check_blobs(folder, repo)
    return folder


def check_blobs(folder: Path, repo: str) -> None:
    """Raise HubError unless each file of a snapshot in the Hub's cache has the digest that names it there."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        blob = path.resolve()
        if blob == path.absolute():
            continue  # a cache without links, whose files have no digest for a name
        if _digest_as(blob.name, blob) != blob.name:
            blob.unlink()
            path.unlink()
            raise HubError(
                f"{repo} was not fetched: {path.name} is not what the Hub announced (its digest differs), "
                "and was thrown away: run the same command again"
            )


def _digest_as(name: str, blob: Path) -> str:
    """Return a file's digest of the kind that its name in the cache is, or the name if that is none."""
    if re.fullmatch("[0-9a-f]{64}", name):
        return digest_of(blob).sha256
    if re.fullmatch("[0-9a-f]{40}", name):
        return git_digest_of(blob)
    return name
