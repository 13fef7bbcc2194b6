"""The publication manifest: which files of a model are published, their digests, and the probe's answers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.hub.model_folder import find_model_folder
from gpt_kit_hf.hub.native_form import stage_native
from gpt_kit_hf.hub.secret_scan import scan_for_publication
from gpt_kit_hf.storage.atomic_files import load_json, save_json
from gpt_kit_hf.storage.digests import FileDigest, digest_of
from gpt_kit_hf.storage.run_folder import CURVE_FILE, EVENTS_PREFIX, REPORT_FILE, TENSORBOARD_FOLDER

PUBLICATION_FILE = "publication.json"
# The code of the model, for machines without this package; a native model has none.
REMOTE_CODE = (
    *("configuration_gpt_kit.py", "modeling_gpt_kit.py", "transformer_block.py"),
    *("chunked_loss.py", "packed_documents.py", "positions.py"),
)
# All other files of a run stay with it. Adapters are published merged, as the run's root holds them; the adapter's own
# files are for a folder with an adapter alone.
_PUBLISHED_NAMES = (
    *("config.json", "generation_config.json", REPORT_FILE, "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
    *REMOTE_CODE,
    *("adapter_config.json", "adapter_model.safetensors"),
)
_WEIGHTS = ("model.safetensors", "model-")
_MAX_EVENT_BYTES = 50_000_000


@dataclass(frozen=True, kw_only=True)
class PublicationManifest:
    """A folder ready for publication: its files by name, without the manifest's own, and the answers of its probe."""

    folder: Path
    files: Mapping[str, FileDigest]
    probe: Mapping[str, Any]


def stage_files(run: Path, stage: Path, *, native: bool = False, tensorboard: bool = False) -> Path:
    """Copy the files to publish, all but the card, from a run or model folder into an empty folder.

    With `native` the model is written in that form, and with `tensorboard` the curves that TensorBoard has of the run
    are copied. Returns the folder of the model. Raises UsageError for a folder without a model, for one that has no
    native form, and for curves of more than 50 MB.
    """
    if not run.is_dir():
        raise UsageError(f"{str(run)!r}: no such folder")
    folder = Path(find_model_folder(str(run)))
    if native:
        stage_native(folder, str(run), stage)
    for path in sorted(folder.iterdir()):
        weights = path.name.startswith(_WEIGHTS) and path.suffix == ".safetensors"
        if path.name == REPORT_FILE if native else path.name in _PUBLISHED_NAMES or weights:
            shutil.copyfile(path, stage / path.name)
    if (run / CURVE_FILE).is_file():
        shutil.copyfile(run / CURVE_FILE, stage / CURVE_FILE)
    if tensorboard:
        _stage_events(run, stage)
    if not any(stage.glob("*.safetensors")):
        raise UsageError(f"{str(run)!r} holds no weights as safetensors")
    return folder


def _stage_events(run: Path, stage: Path) -> None:
    """Copy TensorBoard's files with the curves of a run, not those with its options, which name local paths."""
    found = sorted((run / TENSORBOARD_FOLDER).glob(f"*/{EVENTS_PREFIX}*"))
    size = sum(path.stat().st_size for path in found)
    if size > _MAX_EVENT_BYTES:
        raise UsageError(
            f"TensorBoard's files in {str(run / TENSORBOARD_FOLDER)!r} have {size / 1e6:.0f} MB, more than the "
            f"{_MAX_EVENT_BYTES / 1e6:.0f} MB that are published: leave them out by --tensorboard false"
        )
    for number, path in enumerate(found):
        # The name begins with the time of the session; the rest names this machine.
        began = path.name.removeprefix(EVENTS_PREFIX).partition(".")[0]
        shutil.copyfile(path, stage / f"{EVENTS_PREFIX}{began}.{number}")


def write_manifest(stage: Path, probe: Mapping[str, Any], private_names: tuple[str, ...]) -> PublicationManifest:
    """Write the manifest into a folder of staged files, then scan the folder.

    Raises CheckpointError if a file in it must not be published.
    """
    files = {path.name: digest_of(path) for path in sorted(stage.iterdir()) if path.name != PUBLICATION_FILE}
    listed = {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
    save_json(stage / PUBLICATION_FILE, {"format": 1, "files": listed, "probe": dict(probe)})
    scan_for_publication(stage, private_names)
    return PublicationManifest(folder=stage, files=files, probe=probe)


def read_manifest(folder: Path) -> PublicationManifest:
    """Return the manifest of a downloaded folder. Raises CheckpointError if it is missing or malformed."""
    file = folder / PUBLICATION_FILE
    if not file.is_file():
        raise CheckpointError(f"{PUBLICATION_FILE} is missing: this was not published by gpt-kit push, or not whole")
    listed = load_json(file)
    try:
        files = {name: FileDigest(size=int(v["size"]), sha256=str(v["sha256"])) for name, v in listed["files"].items()}
        return PublicationManifest(folder=folder, files=files, probe=dict(listed["probe"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{PUBLICATION_FILE} is not as gpt-kit push writes it") from None
