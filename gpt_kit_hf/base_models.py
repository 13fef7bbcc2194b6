"""The model that is tuned: where it lies, what tells it from another, and its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from transformers import AutoConfig

from gpt_kit_hf.adapters import AdapterOptions
from gpt_kit_hf.durable_files import feed_file
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.run_folder import find_model_folder


def model_length(model: str | None) -> int:
    """Return how many tokens a model reads, 1,024 where that is not known."""
    if model is None:
        return 1024
    config = load_part(AutoConfig, find_model_folder(model), model)
    return int(config.to_dict().get("max_position_embeddings", 1024))


def find_base(model: str, adapter: AdapterOptions) -> str:
    """Return the folder or Hub id of the model to tune; for an adapter it must be one that stays."""
    place = find_model_folder(model)
    if not Path(model).exists():
        return model  # its id stays the same on other machines, unlike its place in the cache
    if adapter.lora_rank and Path(place).parent.name == "checkpoints":
        raise UsageError(
            f"model {model!r} is at a checkpoint of a run, which may be removed, and an adapter is nothing without "
            "its base: let the run end, or copy the checkpoint to a folder of its own"
        )
    return str(Path(place).resolve())


def weights_digest(source: str, config: Any) -> str:
    """Return what tells a base from another: a digest of its weights, or the commit on the Hub."""
    if not Path(source).is_dir():
        return str(config._commit_hash)
    digest = xxhash.xxh3_64()
    for file in sorted(Path(source).glob("*.safetensors")):
        feed_file(digest, file)
    return str(digest.hexdigest())


def put_on(model: Any, device: str) -> None:
    """Move a model to a device that a user named. Raises UsageError where there is none."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without the device asserts
        raise UsageError(f"device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


def load_part(kind: Any, place: str, named: str, **options: Any) -> Any:
    """Return what an Auto class loads; `named` is what a user called it. Raises UsageError."""
    try:
        return kind.from_pretrained(place, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{named!r} cannot be loaded: {reason}") from None
