"""Publish a run as one commit on the Hub with post-push verification, and pull a model from the Hub."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from gpt_kit_hf.errors import HubError, UsageError
from gpt_kit_hf.hub.card.card import CARD_FILE, card_facts, render_card, without_generated
from gpt_kit_hf.hub.client import fetch_model, hub_errors
from gpt_kit_hf.hub.manifest import PUBLICATION_FILE, REMOTE_CODE, PublicationManifest, stage_files, write_manifest
from gpt_kit_hf.hub.native_form import form_differences
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.hub.secret_scan import scan_for_publication
from gpt_kit_hf.hub.template_sandbox import check_templates
from gpt_kit_hf.hub.verify import VerificationReport, probe_request, run_probe, verify_publication
from gpt_kit_hf.options.hub import PushOptions
from gpt_kit_hf.storage.digests import digest_of, git_digest_of
from gpt_kit_hf.storage.run_folder import EVENTS_PREFIX

# Files of an earlier model, which a loader would read in place of, or beside, those of this one.
_STALE_PREFIXES = (
    "model-",
    "model.safetensors",
    "pytorch_model",
    "adapter_model",
    "adapter_config.json",
    EVENTS_PREFIX,
)
_STALE_NAMES = (
    *("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json"),
    *REMOTE_CODE,
)


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """The result of a push.

    Attributes:
        repo: id of the repository.
        commit: the commit that holds the model, also if it was there before; None after a dry run.
        url: address of the commit, after a dry run of the repository.
        sent: sizes in bytes of the files that were sent, or would be, by name.
        removed: names of the files that were removed, or would be.
        verification: the post-push verification; None after a dry run.

    """

    repo: str
    commit: str | None
    url: str
    sent: Mapping[str, int]
    removed: tuple[str, ...]
    verification: VerificationReport | None


def push_to_hub(
    run: str | Path,
    repo: str,
    options: PushOptions | None = None,
    *,
    api: HfApi | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> PushResult:
    """Publish the model of a run or model folder as one commit, then download and verify it.

    Sent are weights, configuration with code, tokenizer, chat template, generation defaults, card, manifest and the
    curves of TensorBoard, as far as they differ from the repository's; the same commit removes weights and code of an
    earlier model. With `options.native` the model has the form of a class of transformers, and no code. After an
    interruption or a failure the repository holds the old commit or the complete new one, and the same call finishes
    the push.

    Raises:
        UsageError: the folder holds no model.
        CheckpointError: a file must not be published, or the model cannot be loaded.
        HubError: the Hub refused or could not be reached, or the commit is not what was sent.

    """
    options, api, run = options or PushOptions(), api or HfApi(), Path(run)
    with tempfile.TemporaryDirectory(prefix="gpt-kit-push-") as place:
        stage = Path(place) / "stage"
        stage.mkdir()
        folder = stage_files(run, stage, native=options.native, tensorboard=options.tensorboard)
        scan_for_publication(stage, _private_names(run))  # before anything is changed on the Hub
        head = _find_head(repo, options.revision, api) if options.dry_run else _prepare_repository(repo, options, api)
        remote = _remote_files(repo, head, api)
        _write_card(run, stage, repo, _remote_card(repo, head, remote, api), options)
        log("loading the model in a fresh process")
        probe = _probe_staged(run, folder if options.native else None, stage, Path(place) / "probe")
        manifest = write_manifest(stage, probe, _private_names(run))
        result = _planned(repo, remote, manifest, api)
        if options.dry_run:
            return result
        if result.sent or result.removed:
            if result.removed:
                log(f"removing files of an earlier model: {', '.join(result.removed)}")
            log(f"uploading {len(result.sent)} files, {sum(result.sent.values()) / 1e6:.1f} MB")
            head = _commit(head, manifest, result, options, api)
        assert head is not None  # `_prepare_repository` returns one
        log(f"downloading commit {head[:12]} into empty caches to verify it")
        report = verify_publication(repo, head, local=manifest, api=api)
        report.require()
        return dataclasses.replace(result, commit=head, url=f"{result.url}/commit/{head}", verification=report)


def _probe_staged(run: Path, folder: Path | None, stage: Path, work: Path) -> Mapping[str, Any]:
    """Return the probe's answers for what is to be published; a native form must be that of the model in `folder`."""
    places = [stage] if folder is None else [stage, folder]
    answers = run_probe([probe_request(str(place), work) for place in places], work, with_package=True)
    for name, reason in answers[0]["failures"].items():
        raise HubError(f"{run} was not published: its {name} cannot be used: {reason}")
    for difference in form_differences(answers[1], answers[0]) if folder is not None else ():
        raise HubError(f"{run} was not published: its native form is another model: {difference}")
    return answers[0]


def pull_model(repo: str, folder: str | Path, *, revision: str | None = None, api: HfApi | None = None) -> Path:
    """Download a repository's model into a new or empty folder; every digest is checked, no code is run.

    Raises UsageError for a folder that is not empty, HubError for a failed download, CheckpointError for a model that
    is not safe to load (`check_model_folder`).
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
    """Return the head commit of the branch to push to; a missing repository or branch is created."""
    with hub_errors(f"{repo} was not published"):
        if _find_head(repo, None, api) is None:
            api.create_repo(repo, private=options.private, exist_ok=True)
        if options.revision is not None:
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        return str(api.repo_info(repo, revision=options.revision).sha)


def _find_head(repo: str, branch: str | None, api: HfApi) -> str | None:
    """Return the head commit of a branch, None if there is no such repository or branch."""
    with hub_errors(f"{repo} was not published"):
        try:
            return str(api.repo_info(repo, revision=branch).sha)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None


def _remote_files(repo: str, head: str | None, api: HfApi) -> dict[str, RepoFile]:
    """Return the files of a commit by name; an empty dict without a commit."""
    if head is None:
        return {}
    with hub_errors(f"the files of {repo} were not listed"):
        entries = api.list_repo_tree(repo, revision=head, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _remote_card(repo: str, head: str | None, remote: Mapping[str, RepoFile], api: HfApi) -> str | None:
    if CARD_FILE not in remote:
        return None
    with hub_errors(f"the card of {repo} was not fetched"), tempfile.TemporaryDirectory() as place:
        return _read_card(Path(api.hf_hub_download(repo, CARD_FILE, revision=head, local_dir=place)))


def _write_card(run: Path, stage: Path, repo: str, remote: str | None, options: PushOptions) -> None:
    """Write the card with the hand-written text of the card on the Hub, or of the run's if there is none there."""
    own = _read_card(run / CARD_FILE) if (run / CARD_FILE).is_file() else None
    both = own is not None and remote is not None and without_generated(own) != without_generated(remote)
    if both and options.keep_card is None:
        raise HubError(
            f"{repo} was not published: its card was edited on the Hub and in {run.name}/{CARD_FILE}: choose which "
            "text to keep, --keep_card hub or --keep_card run"
        )
    base = own if remote is None or options.keep_card == "run" else remote
    facts = card_facts(run, stage if options.native else None)
    (stage / CARD_FILE).write_bytes(render_card(facts, repo=repo, existing=base).encode())


def _read_card(path: Path) -> str:
    """Return the text of a card with its own line endings."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name} is not UTF-8: {error}") from None


def _planned(repo: str, remote: Mapping[str, RepoFile], manifest: PublicationManifest, api: HfApi) -> PushResult:
    """Return the result of a dry run: the files that the repository lacks or has otherwise, and stale ones in it."""
    names = [*manifest.files, PUBLICATION_FILE]
    sizes = {name: (manifest.folder / name).stat().st_size for name in names}
    return PushResult(
        repo=repo,
        commit=None,
        url=f"{api.endpoint}/{repo}",
        sent={name: sizes[name] for name in names if not _is_same(manifest.folder / name, remote.get(name))},
        removed=tuple(
            name
            for name in sorted(remote.keys() - set(names))
            if name.startswith(_STALE_PREFIXES) or name in _STALE_NAMES
        ),
        verification=None,
    )


def _is_same(path: Path, file: RepoFile | None) -> bool:
    if file is None or file.size != path.stat().st_size:
        return False
    return file.lfs.sha256 == digest_of(path).sha256 if file.lfs is not None else file.blob_id == git_digest_of(path)


def _commit(
    head: str | None, manifest: PublicationManifest, planned: PushResult, options: PushOptions, api: HfApi
) -> str:
    operations: list[CommitOperation] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=manifest.folder / name) for name in planned.sent
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in planned.removed]
    with hub_errors(f"{planned.repo} was not published"):
        made = api.create_commit(
            planned.repo,
            operations,
            commit_message=options.commit_message,
            revision=options.revision,
            create_pr=options.create_pr,
            # Refused if somebody else has committed meanwhile.
            parent_commit=head,
        )
    return str(made.oid)


def _private_names(run: Path) -> tuple[str, ...]:
    """Return the local paths that must not be published, as a file would contain them."""
    return tuple({str(run.absolute()), str(run.resolve()), str(Path.home())} - {"/"})
