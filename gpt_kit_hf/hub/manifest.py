"""What is published of a run: the files of its model, its card, and a list of all of them with their digests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.hub.model_folder import find_model_folder
from gpt_kit_hf.hub.secret_scan import scan_for_publication
from gpt_kit_hf.storage.atomic_files import load_json, save_json
from gpt_kit_hf.storage.digests import FileDigest, digest_of
from gpt_kit_hf.storage.run_folder import CURVE_FILE

PUBLICATION_FILE = "publication.json"
CARD_FILE = "README.md"
# What a model folder may hold that others need; everything else of a run stays with it.
_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "configuration_gpt_kit.py",
    "modeling_gpt_kit.py",
    "chunked_loss.py",
    "packed_documents.py",
    "supervision.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)
# Adapters are published merged, by the root of their run; these are a folder of an adapter alone.
_WEIGHTS = ("model.safetensors", "model-")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A folder that is ready to be published, and its files by name, the list of them left out."""

    folder: Path
    files: Mapping[str, FileDigest]
    probe: Mapping[str, Any]


def stage_files(run: Path, stage: Path) -> None:
    """Copy what is published of a run's or a model's folder into an empty folder; the card is not among it.

    Raises UsageError for a folder without a model.
    """
    if not run.is_dir():
        raise UsageError(f"{str(run)!r}: no such folder")
    source = Path(find_model_folder(str(run)))
    for path in sorted(source.iterdir()):
        weights = path.name.startswith(_WEIGHTS) and path.suffix == ".safetensors"
        if path.name in _NAMES or weights:
            shutil.copyfile(path, stage / path.name)
    if (run / CURVE_FILE).is_file():
        shutil.copyfile(run / CURVE_FILE, stage / CURVE_FILE)
    if not any(stage.glob("*.safetensors")):
        raise UsageError(f"{str(run)!r} holds no weights as safetensors")


def seal(stage: Path, probe: Mapping[str, Any], private_names: tuple[str, ...]) -> Publication:
    """Write the list of a staged folder's files, with what the model answered to `probe`; scan all of it.

    Raises CheckpointError if anything in it must not be published.
    """
    files = {path.name: digest_of(path) for path in sorted(stage.iterdir()) if path.name != PUBLICATION_FILE}
    listed = {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
    save_json(stage / PUBLICATION_FILE, {"format": 1, "files": listed, "probe": dict(probe)})
    scan_for_publication(stage, private_names)
    return Publication(folder=stage, files=files, probe=probe)


def read_publication(folder: Path) -> Publication:
    """Return what a fetched folder says that it holds. Raises CheckpointError if it does not say so."""
    file = folder / PUBLICATION_FILE
    if not file.is_file():
        raise CheckpointError(f"{PUBLICATION_FILE} is missing: this was not published by gpt-kit push, or not whole")
    listed = load_json(file)
    try:
        files = {name: FileDigest(size=int(v["size"]), sha256=str(v["sha256"])) for name, v in listed["files"].items()}
        return Publication(folder=folder, files=files, probe=dict(listed["probe"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{PUBLICATION_FILE} is not as gpt-kit push writes it") from None
