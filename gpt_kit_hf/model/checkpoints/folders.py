"""Model folders of other programs: found, read in part, and written as a whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, StrictDataclassError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from gpt_kit_hf.errors import CheckpointError, UsageError, one_line
from gpt_kit_hf.model.checkpoints.weight_files import PICKLES, SAFETENSORS, tensorflow_hint
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.presets import config_error_message
from gpt_kit_hf.options.files import may_be_hub_id
from gpt_kit_hf.storage.atomic_files import check_can_be_made, load_json

_T = TypeVar("_T")

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


def find_folder(path_or_id: str | Path) -> Path:
    """Return a local folder, or the cached copy of a Hub repository with only the needed files."""
    folder, text = Path(path_or_id), str(path_or_id)
    if folder.is_dir():
        return folder
    # A Hub id is a name with at most an owner before it.
    if isinstance(path_or_id, Path) or folder.exists() or not may_be_hub_id(text):
        raise UsageError(f"{text!r} is no folder{tensorflow_hint(folder)}")
    patterns = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    try:
        fetched = snapshot_download(text, allow_patterns=[*patterns, *SAFETENSORS, "model-*.safetensors"])
        # Many repositories hold both formats; the pickle is downloaded only if there are no safetensors.
        if not any((Path(fetched) / name).is_file() for name in SAFETENSORS):
            fetched = snapshot_download(text, allow_patterns=[*patterns, *PICKLES, "pytorch_model-*.bin"])
        return Path(fetched)
    except RepositoryNotFoundError:
        reason = "no such local folder, and no such repository on the Hub, or no access to it"
    except LocalEntryNotFoundError:
        reason = "no such local folder; the Hub cannot be reached, and its cache does not hold the repository"
    except Exception as error:  # the Hub client also raises errors of its HTTP library
        reason = one_line(error)
    raise UsageError(f"{text!r}: {reason}")


def read_config(folder: Path, types: Collection[str]) -> dict[str, Any]:
    """Return the content of a folder's config.json, with its model_type.

    Raises UsageError for a folder without one, a model_type that is not among `types`, and quantized weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{str(folder)!r} holds no config.json{tensorflow_hint(folder)}")
    stored = load_json(path)
    # The first GPT-2 configurations had no model_type.
    found = stored.get("model_type", "gpt2" if "n_embd" in stored else None)
    if found not in types:
        own = "; to write it as GPT-2, give layout to-gpt2" if found == GPTKitConfig.model_type else ""
        known = " or ".join(map(repr, types))
        raise UsageError(f"{path}: model_type is {found!r}; it must be {known}{own}")
    if stored.get("quantization_config"):
        raise UsageError(f"{path}: the weights are quantized; convert the checkpoint that they were made from")
    return {**stored, "model_type": found}


def read_generation_config(folder: Path, config: GPTKitConfig) -> GenerationConfig:
    """Return the generation defaults of a folder; UsageError for values that transformers refuses."""
    path = folder / "generation_config.json"
    if not path.is_file():
        # Older folders keep generation settings in config.json.
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        return GenerationConfig.from_model_config({**ids, **load_json(folder / "config.json")})
    load_json(path)  # for its error message
    return checked(lambda: GenerationConfig.from_pretrained(folder), path)


def checked(build: Callable[[], _T], source: object) -> _T:
    """Return `build()`; UsageError in one line for a stored value that it refuses."""
    try:
        return build()
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:  # transformers' KeyError is a message
        raise UsageError(f"{source}: {config_error_message(error)}") from None


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that is renamed to it at the end, or removed after an error."""
    final = Path(path).absolute()
    if final.exists() and not (final.is_dir() and next(final.iterdir(), None) is None):
        raise UsageError(f"{str(path)!r} exists and is not an empty folder; nothing is overwritten")
    check_can_be_made(path)
    stage = final.with_name(f".{final.name}.{secrets.token_hex(8)}")
    try:
        stage.mkdir(parents=True)
        yield stage
        stage.rename(final)
    except OSError as error:
        raise CheckpointError(f"{path} was not written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_folder(model: PreTrainedModel, stage: Path, tokenizer_folder: str | Path | None) -> None:
    """Write a model to a folder, and copy the tokenizer of another; UsageError if that does not fit."""
    if tokenizer_folder is not None:
        _write_tokenizer(Path(tokenizer_folder), stage, model.config.vocab_size)
    checked(lambda: model.save_pretrained(stage), "model")


def _write_tokenizer(folder: Path, stage: Path, vocab_size: int) -> None:
    """Copy the tokenizer's files, or rewrite them with AutoTokenizer if they do not name a tokenizer class."""
    settings, written = folder / "tokenizer_config.json", stage / "tokenizer.json"
    try:
        if (folder / written.name).is_file() and settings.is_file() and "tokenizer_class" in load_json(settings):
            for name in TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, stage / name)
        else:
            AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).save_pretrained(str(stage))
        ids = Tokenizer.from_file(str(written)).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UsageError(f"tokenizer_folder {str(folder)!r} cannot be read: {one_line(error)}") from None
    if max(ids, default=0) >= vocab_size:
        raise UsageError(f"tokenizer_folder {str(folder)!r} has the id {max(ids)}, the model vocab_size={vocab_size}")
