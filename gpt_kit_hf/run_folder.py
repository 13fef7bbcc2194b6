"""The folder of a run: what lies where in it, who may begin or continue there, and the model folders in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import tiktoken
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedConfig

from gpt_kit_hf.checkpointing import latest_checkpoint, list_checkpoints
from gpt_kit_hf.durable_files import sync_path
from gpt_kit_hf.errors import CheckpointError, HubError, UsageError
from gpt_kit_hf.folder_checks import check_model_folder
from gpt_kit_hf.hub_client import fetch_model
from gpt_kit_hf.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.run_lock import move_aside
from gpt_kit_hf.sharded_state import uncut_model
from gpt_kit_hf.template_limits import check_templates
from gpt_kit_hf.tokenization import END_OF_TEXT, check_fingerprint
from gpt_kit_hf.tokenizer_twin import load_encoding, save_tokenizer

OPTIONS_FILE = "options.json"
RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
EVALUATIONS_FILE = "evaluations.json"
LOCK_FILE = "run.lock"


def check_run_folder(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UsageError, with nothing changed, if a run can neither begin nor continue in the folder."""
    if resume and overwrite:
        raise UsageError("resume and overwrite: give one of them; the first keeps the run, the second replaces it")
    try:
        existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
        holds = holds_run(run)
    except (OSError, ValueError) as error:
        raise UsageError(f"output_dir {str(run)!r} cannot be used: {error}") from None
    if holds and not (resume or overwrite):
        raise UsageError(f"output_dir {str(run)!r} already holds a run: use resume, overwrite or another folder")
    if not existing.is_dir():
        raise UsageError(f"output_dir {str(run)!r} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {str(run)!r} is not writable")
    if existing == run.absolute() and not holds:
        # What a run killed in its first moment leaves is ours.
        ours = (LOCK_FILE, f".{LOCK_FILE}.", f".{OPTIONS_FILE}.")
        others = sorted(path.name for path in run.iterdir() if not path.name.startswith(ours))
        if others:
            raise UsageError(
                f"output_dir {str(run)!r} holds other files ({', '.join(others[:3])}): name a new or empty folder"
            )


def make_run_folder(run: Path, *, overwrite: bool) -> str | None:
    """Make the folder of a new run; return where a run that was there lies now, if one had to be moved aside."""
    moved = str(move_aside(run)) if overwrite and holds_run(run) else None
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir {str(run)!r} cannot be made: {error.strerror}") from None
    return moved


def holds_run(run: Path) -> bool:
    """Return whether a run was begun in the folder."""
    return (run / OPTIONS_FILE).is_file() or bool(list_checkpoints(run))


def write_model_folder(
    folder: Path,
    model: GPTKitForCausalLM,
    encoding: tiktoken.Encoding,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write what `from_pretrained` loads: weights, configuration, remote code, generation defaults, tokenizer.

    `weights` are the model's of an earlier moment, if not of now.
    """
    end = encoding.encode_single_token(END_OF_TEXT)
    # Padding has an id in generation only, where the attention mask hides it; the tokenizer has none (see there).
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    whole = uncut_model(model) if isinstance(model, FSDPModule) else model
    whole.save_pretrained(str(folder), state_dict=weights)
    save_tokenizer(encoding, folder, model_max_length=model.config.max_position_embeddings)


def publish_in_run(run: Path, source: Path) -> None:
    """Copy a checkpoint's model files into the run's root, each whole or not at all, so that the run loads itself."""
    names = [path.name for path in source.iterdir() if path.suffix in (".json", ".py", ".safetensors", ".jinja")]
    internal = {"manifest.json", "training_state.json", "optimizer.safetensors"}
    for name in sorted(set(names) - internal, key=lambda name: (name == "config.json", name)):
        target, stage = run / name, run / f".{name}.stage"
        try:
            shutil.copyfile(source / name, stage)
            sync_path(stage)
            stage.replace(target)
        except OSError as error:
            raise CheckpointError(f"{target} was not written: {error}") from error
    sync_path(run)


def find_model_folder(place: str) -> str:
    """Return the folder that `from_pretrained` loads for a run folder, a model folder or a Hub id.

    A run that has not ended is read at its newest intact checkpoint; what is on the Hub is fetched into its cache, and
    every byte checked. Raises UsageError for a folder with no model, HubError for what cannot be fetched,
    CheckpointError for a folder that cannot be loaded safely (`check_model_folder`).
    """
    folder = Path(place)
    if not folder.exists():
        # A Hub id has a name and at most an owner before it.
        if place.count("/") > 1 or place.startswith((".", "/", "~")):
            raise UsageError(f"{place!r}: no such folder")
        try:
            folder = fetch_model(place)
        except HubError as error:
            raise HubError(f"{place!r} is no folder here, and {error}") from None
        check_model_folder(folder)
        check_templates(folder)
        return str(folder)
    if not (folder / "config.json").is_file():
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            raise UsageError(f"{place!r} holds no model: neither a config.json nor a checkpoint")
        folder = checkpoint
    check_model_folder(folder)
    return str(folder)


def check_tokenizer(folder: str, config: PreTrainedConfig) -> None:
    """Raise UsageError if a model folder's tokenizer is not the one that its model was trained with.

    A model that records none, as those of other makers, and one that is on the Hub are not checked.
    """
    expected = config.to_dict().get("tokenizer_fingerprint")
    if expected is not None and Path(folder).is_dir():
        check_fingerprint(load_encoding(folder), expected, folder)
