"""LoRA adapters, by PEFT, which is an optional dependency."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.finetuning import AdapterOptions


def add_adapter(model: Any, options: AdapterOptions) -> Any:
    """Return the model with a new adapter, and only that trainable. Raises UsageError for unknown target modules."""
    targets = options.lora_target_modules
    peft = _peft()
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
    """Return the model with the adapter in a folder, trainable."""
    with _without_peft_noise():
        return _peft().PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def replace_adapter(model: Any, folder: Path) -> None:
    """Give the model's adapter the weights of the one in a folder."""
    peft = _peft()
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))


@contextmanager
def _without_peft_noise() -> Iterator[None]:
    """Hide a warning that PEFT causes by reading an attribute of transformers under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError("lora_r needs PEFT: pip install 'gpt-kit-hf[peft]'") from None
    return peft
