"""Options of finetuning: the model to start from, how it is evaluated, and LoRA."""

from __future__ import annotations

import dataclasses

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.data import KEEP
from gpt_kit_hf.options.declare import REQUIRED, Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions(Options):
    """The model to finetune, and the rows it is evaluated on."""

    model_name_or_path: str = option(
        REQUIRED, "folder of a run or model, or Hub id", card="path_or_id", names="model", metavar="MODEL"
    )
    chat_template: str = option(
        KEEP,
        "chat template saved with the tokenizer; keep is the model's own or, if it has none, the one that matches the "
        "format of the rows",
        choices=(KEEP, "default", "alpaca"),
    )
    dropout: float | None = option(
        None,
        "dropout probability of embeddings, attention and residual connections during training",
        minimum=0,
        below=1,
        unset="the model's own",
    )
    eval_rows: list[str] | None = option(
        None,
        "files or globs of rows to evaluate on",
        unset="eval_fraction of the rows",
        card="path",
        names="files",
    )
    eval_fraction: float = option(0.1, "fraction of the rows to evaluate on instead of training", above=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions(Options):
    """LoRA: train a low-rank adapter (Hu et al. 2021) instead of all weights."""

    lora_r: int = option(0, "rank of the adapter; 0 trains all weights (needs the extra peft)", minimum=0)
    lora_alpha: float | None = option(
        None, "scale: the adapter's output is multiplied by lora_alpha / lora_r", above=0, unset="2 * lora_r"
    )
    lora_dropout: float = option(0.0, "dropout probability of the adapter's input", minimum=0, below=1)
    lora_target_modules: list[str] = option(
        ["all-linear"],
        "names of the modules that get an adapter, such as q_proj v_proj; all-linear is every linear layer except the "
        "output projection",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_r == 0 and (self.lora_alpha is not None or self.lora_dropout):
            raise UsageError("lora_alpha and lora_dropout are for lora_r above 0")
        if not self.lora_target_modules:
            raise UsageError("lora_target_modules is empty: name modules, or all-linear")
