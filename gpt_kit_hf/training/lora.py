"""LoRA adapters, by PEFT, which is an optional dependency."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_kit_hf.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A low-rank adapter (Hu et al. 2021, "LoRA") instead of the weights themselves."""

    lora_rank: int = dataclasses.field(
        default=0, metadata={"help": "rank of a LoRA adapter; 0 trains all weights (extra: peft)"}
    )
    lora_alpha: float | None = dataclasses.field(
        default=None, metadata={"help": "the adapter counts lora_alpha / lora_rank; twice the rank if not given"}
    )
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "dropout before the adapter"})
    lora_targets: list[str] = dataclasses.field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "modules that get an adapter, such as q_proj v_proj; all-linear is all but the head"},
    )

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise UsageError(f"lora_rank must be at least 0, got {self.lora_rank}")
        if self.lora_rank == 0 and (self.lora_alpha is not None or self.lora_dropout):
            raise UsageError("lora_alpha and lora_dropout are for lora_rank above 0")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise UsageError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UsageError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if not self.lora_targets:
            raise UsageError("lora_targets is empty: name modules, or all-linear")


def add_adapter(model: Any, options: AdapterOptions) -> Any:
    """Return the model with a new adapter, and only that trainable. Raises UsageError for unknown target modules."""
    targets = options.lora_targets
    peft = _peft()
    config = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        with _without_peft_noise():
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora_targets {targets}: {str(error).splitlines()[0]}") from None


def load_adapter(model: Any, folder: Path) -> Any:
    """Return the model with the adapter in a folder, trainable."""
    with _without_peft_noise():
        return _peft().PeftModel.from_pretrained(model, str(folder), is_trainable=True)


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
        raise UsageError("lora_rank needs PEFT: pip install 'gpt-kit-hf[peft]'") from None
    return peft
