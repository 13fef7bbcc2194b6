"""Options of conversion from and to other checkpoint layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from gpt_kit_hf.options.declare import REQUIRED, Options, option
from gpt_kit_hf.options.model import Activation

Layout: TypeAlias = Literal["gpt2", "nanogpt", "kit", "to-gpt2"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """A checkpoint to convert."""

    positionals: ClassVar[tuple[str, ...]] = ("source", "destination")

    source: str = option(REQUIRED, "model folder, Hub id, or file of weights", names="model", metavar="SOURCE")
    destination: str = option(REQUIRED, "folder to write; it must be empty or not exist yet", metavar="DESTINATION")
    layout: Layout = option(
        REQUIRED,
        "gpt2: from a GPT-2 folder or Hub id; nanogpt, kit: from a file of weights (safetensors, or a pickle that "
        "holds only tensors); to-gpt2: from a folder of this package to GPT-2",
    )
    n_head: int | None = option(
        None, "number of attention heads (nanogpt, kit)", minimum=1, unset="what the file of weights says"
    )
    hidden_act: Activation | None = option(None, "activation function (nanogpt, kit)", unset="that of the layout")
    eos_token_id: int | None = option(
        None, "token id of the end of text (nanogpt, kit)", minimum=0, unset="what the tokenizer says, if there is one"
    )
    zero_missing_biases: bool = option(
        False,
        "set the biases of the query, key and value projections to zero if only these are missing (nanogpt, kit)",
    )
    tokenizer_folder: str | None = option(
        None, "folder of a tokenizer to use", unset="the source's", names="folder", metavar="FOLDER"
    )
