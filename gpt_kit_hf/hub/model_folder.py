"""Model folders: find the one that a user names, load from it, and write one."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import tiktoken
import torch
import xxhash
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from gpt_kit_hf.errors import HubError, UsageError
from gpt_kit_hf.hub.client import fetch_model
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.hub.template_sandbox import check_templates
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM
from gpt_kit_hf.options.files import may_be_hub_id
from gpt_kit_hf.storage.atomic_files import load_json, update_digest
from gpt_kit_hf.storage.checkpoints import latest_checkpoint
from gpt_kit_hf.tokenization.encodings import EOS_TOKEN, check_fingerprint, get_pad_token_id
from gpt_kit_hf.tokenization.export import load_encoding, save_tokenizer
from gpt_kit_hf.tokenization.model_encoding import encoding_of


def find_model_folder(place: str) -> str:
    """Return the folder that `from_pretrained` loads for a run folder, a model folder or a Hub id.

    For an unfinished run this is the newest intact checkpoint. A Hub id is downloaded into the Hub's cache with the
    digest of every file checked. Raises UsageError for a folder without a model and for a classifier, HubError for a
    failed download, CheckpointError for a folder that is not safe to load (`check_model_folder`).
    """
    folder = Path(place)
    if not folder.exists():
        if not may_be_hub_id(place):
            raise UsageError(f"{place!r}: no such folder")
        try:
            folder = fetch_model(place)
        except HubError as error:
            raise HubError(f"{place!r}: no such folder, and {error}") from None
        check_model_folder(folder)
        check_templates(folder)
        _refuse_classifier(folder, place)
        return str(folder)
    if not (folder / "config.json").is_file():
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            raise UsageError(f"{place!r} holds no model: neither a config.json nor a checkpoint")
        folder = checkpoint
    check_model_folder(folder)
    _refuse_classifier(folder, place)
    return str(folder)


def _refuse_classifier(folder: Path, place: str) -> None:
    """Raise UsageError for a model without an output projection: transformers would make one up."""
    path = folder / "config.json"
    for name in (load_json(path).get("architectures") or ()) if path.is_file() else ():
        if found := re.search(r"For(SequenceClassification|TokenClassification|QuestionAnswering)$", str(name)):
            raise UsageError(
                f"{place!r} holds a {name}, which labels text and writes none; load it with AutoModel{found[0]} of "
                "transformers"
            )


def find_base(model: str, *, permanent: bool) -> tuple[str, str | None]:
    """Return the folder or Hub id of the model to train further, and its commit on the Hub, None for a folder.

    A `permanent` base, which an adapter needs, must not be a run's checkpoint, as a run deletes those. Raises
    UsageError, and what `find_model_folder` raises.
    """
    place = find_model_folder(model)
    if not Path(model).exists():
        return model, Path(place).name  # the id is the same on other machines, its snapshot in the cache is not
    if permanent and Path(place).parent.name == "checkpoints":
        raise UsageError(
            f"model {model!r} is at a checkpoint of a run, which may be deleted, and an adapter needs its "
            "base: let the run end, or copy the checkpoint to another folder"
        )
    return str(Path(place).resolve()), None


def weights_digest(folder: str) -> str:
    """Return a digest of the weights in a model folder."""
    digest = xxhash.xxh3_64()
    for file in sorted(Path(folder).glob("*.safetensors")):
        update_digest(digest, file)
    return str(digest.hexdigest())


def check_tokenizer(folder: str, config: PreTrainedConfig) -> None:
    """Raise UsageError if a model folder's tokenizer is not the one that its model was trained with.

    Not checked are models whose configuration has no fingerprint of the tokenizer, and models on the Hub.
    """
    expected = config.to_dict().get("tokenizer_fingerprint")
    if expected is not None and Path(folder).is_dir():
        check_fingerprint(load_encoding(folder), expected, folder)


def load_text_encoding(folder: str, named: str) -> tiktoken.Encoding:
    """Return the tokenizer of a model folder as an encoding of text; `named` is the model's name in a message."""
    with suppress(UsageError):
        found = load_encoding(folder)
        if EOS_TOKEN in found.special_tokens_set:
            return found
    return encoding_of(load_pretrained(AutoTokenizer, folder, named), Path(named).name)


def write_model_folder(
    folder: Path,
    model: GPTKitForCausalLM,
    encoding: tiktoken.Encoding,
    weights: dict[str, torch.Tensor] | None = None,
    *,
    begins: bool = True,
) -> None:
    """Write what `from_pretrained` loads: weights, configuration, remote code, generation defaults, tokenizer.

    `weights` is a state dict to write instead of the model's current one. If no text `begins` after EOS in training,
    generation has no BOS token.
    """
    eos, pad = encoding.encode_single_token(EOS_TOKEN), get_pad_token_id(encoding)
    length = model.config.max_position_embeddings
    # Without a padding token, only generation has a padding id, which the attention mask hides (`to_transformers`).
    model.generation_config = GenerationConfig(
        bos_token_id=eos if begins else None,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        max_length=length,
    )
    model.save_pretrained(str(folder), state_dict=weights)
    save_tokenizer(encoding, folder, model_max_length=length)


def load_pretrained(kind: Any, place: str, named: str, **options: Any) -> Any:
    """Return `kind.from_pretrained(place)`, an Auto class; `named` is the model's name in a message. UsageError."""
    try:
        return kind.from_pretrained(place, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if kind is AutoTokenizer and Path(place).is_dir() and not holds_tokenizer(Path(place)):
            raise UsageError(f"{named!r} holds no tokenizer: copy the files of one into the folder") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{named!r} cannot be loaded: {reason}") from None


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds the files of a tokenizer."""
    return any(file.name.startswith(("tokenizer", "vocab")) for file in folder.iterdir())


def move_to_device(model: Any, device: str) -> None:
    """Move a model to a device. Raises UsageError for a device that is not available."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts if it was built without the device
        raise UsageError(f"device {device!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


def model_length(model: str) -> int:
    """Return the context length of a model in tokens, 1,024 if it is unknown."""
    config = load_pretrained(AutoConfig, find_model_folder(model), model)
    return int(config.to_dict().get("max_position_embeddings", 1024))
