"""Published GPT sizes and laptop sizes by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError

from gpt_kit_hf.errors import UsageError, unknown_name
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig


def _shape(n_layer: int, n_embd: int, n_head: int, context: int = 1024, vocab_size: int = 50257) -> dict[str, int]:
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "max_position_embeddings": context,
        "vocab_size": vocab_size,
    }


# GPT-2: Radford et al. 2019, table 2. GPT-3: Brown et al. 2020, table 2.1; its dense sizes, where the printed heads
# and widths do not divide (24 heads of 128 at width 2048; width 5140) the divisible neighbour is taken. GPT-1:
# Radford et al. 2018, section 4.1; its size, in this pre-norm architecture.
PRESETS = MappingProxyType(
    {
        "gpt2-small (124M)": _shape(12, 768, 12),
        "gpt2-medium (355M)": _shape(24, 1024, 16),
        "gpt2-large (774M)": _shape(36, 1280, 20),
        "gpt2-xl (1558M)": _shape(48, 1600, 25),
        "gpt3-small (125M)": _shape(12, 768, 12, 2048),
        "gpt3-medium (350M)": _shape(24, 1024, 16, 2048),
        "gpt3-large (760M)": _shape(24, 1536, 16, 2048),
        "gpt3-xl (1.3B)": _shape(24, 2048, 16, 2048),
        "gpt3-2.7b (2.7B)": _shape(32, 2560, 32, 2048),
        "gpt3-6.7b (6.7B)": _shape(32, 4096, 32, 2048),
        "gpt3-13b (13B)": _shape(40, 5120, 40, 2048),
        "gpt1 (117M)": _shape(12, 768, 12, 512, 40478),
        "nano-xs (4x128)": _shape(4, 128, 4, 256),
        "nano-s (4x256)": _shape(4, 256, 4, 256),
        "nano-m (6x384)": _shape(6, 384, 6, 512),
        "nano-l (8x512)": _shape(8, 512, 8, 1024),
    }
)
_GPT2_VOCABULARY = 50257
_GPT2_END_OF_TEXT = 50256


def create_model_config(name: str, *, dropout: float | None = None, **overrides: Any) -> GPTKitConfig:
    """Return the configuration of a preset, by its full name or its key ("gpt2-small"), with fields overridden.

    `dropout` sets the three dropout probabilities at once. Raises UsageError, a ValueError, for an unknown name or
    field (it suggests the nearest) and for a value that breaks a rule of the configuration.
    """
    key = name.strip().lower()
    shapes = {full: shape for full, shape in PRESETS.items() if key in (full.lower(), full.split(" ")[0])}
    if not shapes:
        raise UsageError(unknown_name("model preset", name, [full.split(" ")[0] for full in PRESETS]))
    values: dict[str, Any] = {**next(iter(shapes.values()))}
    for given in list(overrides):
        values.pop(GPTKitConfig.attribute_map.get(given, given), None)
    if values.get("vocab_size") == _GPT2_VOCABULARY:
        values |= {"bos_token_id": _GPT2_END_OF_TEXT, "eos_token_id": _GPT2_END_OF_TEXT}
    if dropout is not None:
        values |= {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
    try:
        return GPTKitConfig(**{**values, **overrides})
    except (StrictDataclassError, ValueError) as error:
        # `strict` wraps the sentence that says what is wrong.
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise UsageError(str(reason)) from None


def _option(help_text: str) -> Any:
    return dataclasses.field(default=None, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model to build: a preset, and what to change of it. The vocabulary size follows the encoding."""

    model: str = dataclasses.field(
        default="nano-s",
        metadata={"help": "preset to start from: " + ", ".join(full.split(" ")[0] for full in PRESETS)},
    )
    n_layer: int | None = _option("number of blocks, if not the preset's")
    n_head: int | None = _option("attention heads of a block, if not the preset's")
    n_embd: int | None = _option("model width, divisible by n_head, if not the preset's")
    n_inner: int | None = _option("width inside the feed-forward layers, if not 4 n_embd")
    max_position_embeddings: int | None = _option("size of the position table, if not the preset's")
    dropout: float | None = _option("dropout probability of embeddings, attention and residuals, if not 0")
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh"] | None = _option("form of the GELU, if not tanh")
    position_embedding: Literal["learned", "sinusoidal"] | None = _option("kind of the position table, if not learned")
    use_bias: bool | None = _option("biases in linear layers and norms, if not true")
    tie_word_embeddings: bool | None = _option("output projection shares the token embedding, if not true")
    layer_norm_epsilon: float | None = _option("epsilon of the norms, if not 1e-5")
    initializer_range: float | None = _option("standard deviation of the first weights, if not 0.02")

    def build(self, **from_the_data: Any) -> GPTKitConfig:
        """Return the configuration; `from_the_data` are fields that data and encoding decide."""
        overrides = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k != "model"}
        return create_model_config(self.model, **{**from_the_data, **overrides})
