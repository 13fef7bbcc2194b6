"""Model folders: finding the one that a name stands for, loading from it, and writing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiktoken
import torch
import xxhash
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from gpt_kit_hf.errors import HubError, UsageError
from gpt_kit_hf.hub.client import fetch_model
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.hub.template_sandbox import check_templates
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.options.finetuning import AdapterOptions
from gpt_kit_hf.storage.atomic_files import feed_file
from gpt_kit_hf.storage.checkpoints import latest_checkpoint
from gpt_kit_hf.tokenization.encodings import END_OF_TEXT, check_fingerprint
from gpt_kit_hf.tokenization.export import load_encoding, save_tokenizer


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
    model.save_pretrained(str(folder), state_dict=weights)
    save_tokenizer(encoding, folder, model_max_length=model.config.max_position_embeddings)


def load_part(kind: Any, place: str, named: str, **options: Any) -> Any:
    """Return what an Auto class loads; `named` is what a user called it. Raises UsageError."""
    try:
        return kind.from_pretrained(place, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{named!r} cannot be loaded: {reason}") from None


def put_on(model: Any, device: str) -> None:
    """Move a model to a device that a user named. Raises UsageError where there is none."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without the device asserts
        raise UsageError(f"device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


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
    if adapter.lora_r and Path(place).parent.name == "checkpoints":
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
