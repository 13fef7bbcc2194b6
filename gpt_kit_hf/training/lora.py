"""LoRA adapters by PEFT, which is an extra of this package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.finetuning import AdapterOptions


def add_adapter(model: Any, options: AdapterOptions) -> Any:
    """Return the model with a new adapter, which alone is trained. Raises UsageError for targets it does not have."""
    peft = _peft()
    targets = options.lora_target_modules
    config = peft.LoraConfig(
        r=options.lora_r,
        lora_alpha=2 * options.lora_r if options.lora_alpha is None else options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        with _without_peft_noise():
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora_target_modules {targets}: {str(error).splitlines()[0]}") from None


def load_adapter(model: Any, folder: Path) -> Any:
    """Return the model with the adapter in a folder, to be trained on."""
    with _without_peft_noise():
        return _peft().PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def merged(model: Any) -> Any:
    """Return the model itself, its adapter added to its weights."""
    return model.merge_and_unload()


@contextmanager
def _without_peft_noise() -> Iterator[None]:
    """Keep from the user that PEFT reads an attribute of transformers by its former name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError("lora_r needs PEFT: pip install 'gpt-kit-hf[peft]'") from None
    return peft
