"""Publishing: a run becomes one commit on the Hub, which is fetched again and compared; and the way back."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from gpt_kit_hf.errors import HubError, UsageError
from gpt_kit_hf.hub.card.card import card_facts, render_card, without_generated
from gpt_kit_hf.hub.client import fetch_model, hub_errors
from gpt_kit_hf.hub.manifest import (
    CARD_FILE,
    PUBLICATION_FILE,
    Publication,
    seal,
    stage_files,
)
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.hub.secret_scan import scan_for_publication
from gpt_kit_hf.hub.template_sandbox import check_templates
from gpt_kit_hf.hub.verify import GateReport, probe_request, run_probe, verify_publication
from gpt_kit_hf.options.hub import PushOptions
from gpt_kit_hf.storage.digests import digest_of, git_digest_of

# Weights of an earlier model, which a loader would read instead of, or beside, those of this one.
_OUTDATED = ("model-", "model.safetensors", "pytorch_model", "adapter_model", "adapter_config.json")
_OUTDATED_NAMES = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What came of it: the commit, its address, the files sent with their bytes, those removed, and the gate.

    `commit` is the one that holds the model, also if it was there already; None after a dry run, as is `gate`.
    """

    repo: str
    commit: str | None
    url: str
    sent: Mapping[str, int]
    removed: tuple[str, ...]
    gate: GateReport | None


def push_to_hub(
    run: str | Path,
    repo: str,
    options: PushOptions | None = None,
    *,
    api: HfApi | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PushResult:
    """Publish the model of a run, or of a model folder, as one commit; then fetch it and compare (the gate).

    Sent are weights, configuration with code, tokenizer, chat template, generation defaults, card and the list of all
    of them, as far as they differ from what is there; weights of an earlier model are removed by the same commit.
    Interrupted or failed, the repository has the old commit or the whole new one, and the same call converges.

    Raises:
        UsageError: the folder holds no model.
        CheckpointError: something in it must not be published, or cannot be loaded.
        HubError: the Hub refused or could not be reached; or what is there is not what was sent.

    """
    chosen, api = options or PushOptions(), api or HfApi()
    with tempfile.TemporaryDirectory(prefix="gpt-kit-push-") as place:
        stage = Path(place) / "stage"
        stage.mkdir()
        stage_files(Path(run), stage)
        scan_for_publication(stage, _private_names(Path(run)))  # before anything is done on the Hub
        head = _head(repo, chosen.revision, api) if chosen.dry_run else _prepare_repository(repo, chosen, api)
        there = _files_on_hub(repo, head, api)
        _write_card(Path(run), stage, repo, _card_on_hub(repo, head, there, api), chosen)
        say("asking a fresh process what the model does")
        probe = run_probe([probe_request(str(stage), Path(place))], Path(place) / "probe", with_package=True)[0]
        for part, reason in probe["failures"].items():
            raise HubError(f"{run} was not published: its {part} cannot be used: {reason}")
        publication = seal(stage, probe, _private_names(Path(run)))
        sent, removed = _changes(there, publication)
        if chosen.dry_run:
            return _result(repo, None, publication, sent, removed, None, api)
        commit = head
        if sent or removed:
            say(f"sending {len(sent)} files, {_megabytes(publication, sent)}")
            commit = _commit(repo, head, publication, sent, removed, chosen, api)
        assert commit is not None
        say(f"fetching {commit[:12]} again, into empty caches")
        gate = verify_publication(repo, commit, local=publication, api=api)
        gate.require()
        return _result(repo, commit, publication, sent, removed, gate, api)


def pull_model(repo: str, folder: str | Path, *, revision: str | None = None, api: HfApi | None = None) -> Path:
    """Fetch a repository's model into a new or empty folder, every byte checked, and look at it; nothing is run.

    Raises UsageError for a folder that holds something, HubError if it cannot be fetched, CheckpointError if it
    cannot be loaded safely (`check_model_folder`).
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"folder {str(folder)!r} is not empty: name a new one")
    source = fetch_model(repo, revision=revision, with_code=True, api=api)
    check_model_folder(source)
    check_templates(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as place:
            copy = Path(place) / "copy"
            shutil.copytree(source, copy)  # the files themselves, not the cache's links
            if target.exists():
                target.rmdir()
            copy.rename(target)
    except OSError as error:
        raise UsageError(f"folder {str(folder)!r} cannot be written: {error.strerror}") from None
    return target


# --- the repository -------------------------------------------------------------------------------------


def _prepare_repository(repo: str, options: PushOptions, api: HfApi) -> str:
    """Return the head of the repository's branch; both are made where they are not there."""
    with hub_errors(f"{repo} was not published"):
        head = _find_head(repo, None, api)
        if head is None:
            api.create_repo(repo, private=options.private, exist_ok=True)
        if options.revision is not None:
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        return str(api.repo_info(repo, revision=options.revision).sha)


def _head(repo: str, branch: str | None, api: HfApi) -> str | None:
    with hub_errors(f"{repo} was not looked at"):
        return _find_head(repo, branch, api)


def _find_head(repo: str, branch: str | None, api: HfApi) -> str | None:
    try:
        return str(api.repo_info(repo, revision=branch).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _write_card(run: Path, stage: Path, repo: str, there: str | None, options: PushOptions) -> None:
    """Write the card, around what a person wrote in the one on the Hub, or in the run's for the first time."""
    own = _text_of(run / CARD_FILE) if (run / CARD_FILE).is_file() else None
    both = own is not None and there is not None and without_generated(own) != without_generated(there)
    if both and options.keep_card is None:
        raise HubError(
            f"{repo} was not published: its card was edited on the Hub and in {run.name}/{CARD_FILE}: say which to "
            "keep, --card hub or --card run"
        )
    base = own if there is None or options.keep_card == "run" else there
    (stage / CARD_FILE).write_bytes(render_card(card_facts(run), repo=repo, existing=base).encode())


def _card_on_hub(repo: str, head: str | None, there: Mapping[str, RepoFile], api: HfApi) -> str | None:
    if CARD_FILE not in there:
        return None
    with hub_errors(f"the card of {repo} was not fetched"), tempfile.TemporaryDirectory() as place:
        return _text_of(Path(api.hf_hub_download(repo, CARD_FILE, revision=head, local_dir=place)))


def _text_of(card: Path) -> str:
    """Return a card with the line ends that its writer chose."""
    try:
        return card.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{card.name} is not UTF-8: {error}") from None


def _changes(there: Mapping[str, RepoFile], publication: Publication) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which files the repository lacks or has otherwise, and which it has too much."""
    names = [*publication.files, PUBLICATION_FILE]
    sent = tuple(name for name in names if not _is_same(publication.folder / name, there.get(name)))
    removed = tuple(
        name for name in sorted(there.keys() - set(names)) if name.startswith(_OUTDATED) or name in _OUTDATED_NAMES
    )
    return sent, removed


def _files_on_hub(repo: str, head: str | None, api: HfApi) -> dict[str, RepoFile]:
    """Return the files of a commit by name; none where there is no commit."""
    if head is None:
        return {}
    with hub_errors(f"the files of {repo} were not listed"):
        entries = api.list_repo_tree(repo, revision=head, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_same(path: Path, file: RepoFile | None) -> bool:
    if file is None or file.size != path.stat().st_size:
        return False
    return file.lfs.sha256 == digest_of(path).sha256 if file.lfs is not None else file.blob_id == git_digest_of(path)


def _commit(
    repo: str,
    head: str | None,
    publication: Publication,
    sent: tuple[str, ...],
    removed: tuple[str, ...],
    options: PushOptions,
    api: HfApi,
) -> str:
    operations: list[CommitOperation] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=publication.folder / name) for name in sent
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in removed]
    with hub_errors(f"{repo} was not published"):
        made = api.create_commit(
            repo,
            operations,
            commit_message=options.commit_message,
            revision=options.revision,
            create_pr=options.create_pr,
            # Nobody's commit in between is overwritten, and no second one is made of half of the files.
            parent_commit=head,
        )
    return str(made.oid)


def _private_names(run: Path) -> tuple[str, ...]:
    """Return paths of this machine that others must not see, as they would stand in a file."""
    return tuple({str(run.absolute()), str(run.resolve()), str(Path.home())} - {"/"})


def _result(
    repo: str,
    commit: str | None,
    publication: Publication,
    sent: tuple[str, ...],
    removed: tuple[str, ...],
    gate: GateReport | None,
    api: HfApi,
) -> PushResult:
    url = f"{api.endpoint}/{repo}" + ("" if commit is None else f"/commit/{commit}")
    return PushResult(
        repo=repo,
        commit=commit,
        url=url,
        sent={name: (publication.folder / name).stat().st_size for name in sent},
        removed=removed,
        gate=gate,
    )


def _megabytes(publication: Publication, names: tuple[str, ...]) -> str:
    size = sum((publication.folder / name).stat().st_size for name in names)
    return f"{size / 1e6:.1f} MB"
