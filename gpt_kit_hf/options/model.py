"""Options of a new model, a preset and what to change of it, and of a checkpoint to convert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.declare import REQUIRED, Options, option

Activation: TypeAlias = Literal["gelu", "gelu_new", "gelu_pytorch_tanh"]
Shape: TypeAlias = Mapping[str, int | float | str]
Layout: TypeAlias = Literal["gpt2", "llama", "qwen3", "nanogpt", "kit", "gpt-kit", "to-gpt2"]


def _shape(n_layer: int, n_embd: int, n_head: int, context: int = 1024, vocab_size: int = 50257) -> Shape:
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "max_position_embeddings": context,
        "vocab_size": vocab_size,
    }


def _modern(n_layer: int, n_embd: int, n_head: int, context: int = 1024) -> Shape:
    return {
        **_shape(n_layer, n_embd, n_head, context),
        "position_embedding": "rotary",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "qk_norm": True,
        "use_bias": False,
        "zero_init_residual": True,
        "layer_norm_epsilon": 1e-6,
    }


# GPT-2: Radford et al. 2019, table 2. GPT-3: Brown et al. 2020, table 2.1; its dense sizes, where the printed heads
# and widths do not divide (24 heads of 128 at width 2048; width 5140) the divisible neighbour is taken. GPT-1:
# Radford et al. 2018, section 4.1; its size, in this pre-norm architecture. The modern shapes are those of Qwen3
# (Yang et al. 2025, "Qwen3 Technical Report", section 2), each with the parameters of a classic one within 3%.
PRESETS: Mapping[str, Shape] = MappingProxyType(
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
        "modern-xs (4x128)": _modern(4, 128, 4, 256),
        "modern-s (4x256)": _modern(4, 256, 4, 256),
        "modern-m (6x384)": _modern(6, 384, 6, 512),
        "modern-l (8x512)": _modern(8, 512, 8, 1024),
        "modern-124m (124M)": _modern(12, 768, 12),
        "modern-350m (355M)": _modern(24, 1024, 16),
        "modern-1.5b (1558M)": _modern(48, 1600, 25),
    }
)
_CLASSIC: Shape = MappingProxyType({"position_embedding": "learned", "mlp": "gelu"})  # what presets leave out
PRESET_KEYS = tuple(full.split(" ")[0] for full in PRESETS)


def preset_key(name: str) -> str:
    """Return the key of a preset ("gpt2-small") for its key or full name in any case; any other name unchanged."""
    known = {**{key: key for key in PRESET_KEYS}, **{full.lower(): full.split(" ")[0] for full in PRESETS}}
    return known.get(name.strip().lower(), name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The model: a preset and changes to it, with the vocabulary size of the encoding, or a model to train further."""

    model_name_or_path: str | None = option(
        None,
        "model to train further, with its tokenizer: folder of a run or model, or Hub id; dropout is the only option "
        "of the model that may be given with it",
        unset="none, a new model",
        card="path_or_id",
        names="model",
        metavar="MODEL",
    )
    model: str = option(
        "modern-s", "preset to start from", choices=PRESET_KEYS, normalize=preset_key, noun="model preset"
    )
    n_layer: int | None = option(None, "number of transformer blocks", minimum=1, unset="the preset's")
    n_head: int | None = option(None, "attention heads per block", minimum=1, unset="the preset's")
    n_embd: int | None = option(None, "model width; must be divisible by n_head", minimum=1, unset="the preset's")
    num_key_value_heads: int | None = option(
        None, "heads of keys and values per block; must divide n_head", minimum=1, unset="n_head"
    )
    head_dim: int | None = option(None, "width of a head", minimum=1, unset="n_embd / n_head")
    n_inner: int | None = option(
        None,
        "width of the feed-forward layers",
        minimum=1,
        unset="4 * n_embd; with swiglu 8/3 * n_embd, rounded up to a multiple of 32",
    )
    max_position_embeddings: int | None = option(
        None, "the longest context in tokens", minimum=1, unset="the preset's"
    )
    dropout: float | None = option(
        None,
        "dropout probability of embeddings, attention and residual connections",
        minimum=0,
        below=1,
        unset="0, or that of model_name_or_path",
    )
    attn_pdrop: float | None = option(
        None,
        "dropout probability of attention, if another than dropout; above 0, attention is slower, as the fast kernels "
        "of a CPU have no dropout",
        minimum=0,
        below=1,
        unset="dropout",
    )
    mlp: Literal["gelu", "swiglu"] | None = option(
        None, "kind of feed-forward layers: two matrices with a GELU, or three with a gated SiLU", unset="the preset's"
    )
    hidden_act: Activation | None = option(
        None,
        "activation function of gelu feed-forward layers: exact GELU or one of its tanh approximations",
        unset="gelu_pytorch_tanh",
    )
    position_embedding: Literal["learned", "sinusoidal", "rotary"] | None = option(
        None, "kind of position embedding", unset="the preset's"
    )
    rope_theta: float | None = option(
        None, "base of the rotation rates of rotary positions", above=0, unset="10000 where positions are rotary"
    )
    norm: Literal["layernorm", "rmsnorm"] | None = option(None, "kind of norms", unset="the preset's")
    qk_norm: bool | None = option(None, "normalise queries and keys, head by head", unset="the preset's")
    use_bias: bool | None = option(None, "add bias terms to linear layers and norms", unset="the preset's")
    tie_word_embeddings: bool | None = option(
        None, "share the token embedding with the output projection", unset="true"
    )
    layer_norm_epsilon: float | None = option(None, "epsilon of the norms", above=0, unset="the preset's")
    initializer_range: float | None = option(None, "standard deviation of the initial weights", above=0, unset="0.02")
    zero_init_residual: bool | None = option(
        None, "start each block as the identity: its two output projections are zero at first", unset="the preset's"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is not None:
            changed = [name for name in SHAPE if getattr(self, name) != getattr(type(self), name)]
            check_no_shape(self.model_name_or_path, {name: getattr(self, name) for name in changed})
        if (self.n_head is None) == (self.n_embd is None):  # a plan chooses the other one
            self.check_shape()

    @property
    def context(self) -> int:
        """The longest context, in tokens."""
        return int(self._value("max_position_embeddings"))

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The number of layers, the heads of each, and their width."""
        layers, heads, width = (int(self._value(name)) for name in ("n_layer", "n_head", "n_embd"))
        return layers, heads, width

    def check_shape(self) -> None:
        """Raise UsageError for numbers that do not fit each other; the configuration checks them again."""
        n_embd, n_head = int(self._value("n_embd")), int(self._value("n_head"))
        positions = self._value("position_embedding")
        if n_embd % n_head and self.head_dim is None:
            raise UsageError(f"n_embd must be divisible by n_head, got {n_embd} and {n_head}")
        if n_head % (self.num_key_value_heads or n_head):
            raise UsageError(
                f"n_head must be divisible by num_key_value_heads, got {n_head} and {self.num_key_value_heads}"
            )
        head_dim = self.head_dim or n_embd // n_head
        if positions == "rotary" and head_dim % 2:
            raise UsageError(f"head_dim must be even for rotary positions, got {head_dim}")
        if positions == "sinusoidal" and n_embd % 2:
            raise UsageError(f"n_embd must be even for sinusoidal positions, got {n_embd}")
        if positions != "rotary" and self.rope_theta is not None:
            raise UsageError(f"rope_theta={self.rope_theta} needs position_embedding=rotary, got {positions}")
        if self.hidden_act is not None and self._value("mlp") != "gelu":
            raise UsageError(f"hidden_act={self.hidden_act} needs mlp=gelu, got {self._value('mlp')}")

    def _value(self, name: str) -> int | float | str:
        """Return what was given for a field, or the preset's value."""
        given: int | float | str | None = getattr(self, name)
        preset = next(shape for full, shape in PRESETS.items() if full.split(" ")[0] == preset_key(self.model))
        return {**_CLASSIC, **preset}[name] if given is None else given


# The options that say what a new model is.
SHAPE = tuple(
    field.name for field in dataclasses.fields(ModelOptions) if field.name not in ("model_name_or_path", "dropout")
)


def check_no_shape(model: str, given: Mapping[str, object]) -> None:
    """Raise UsageError if an option of a new model is given together with the model to train further."""
    for name in SHAPE:
        if given.get(name) is not None:
            raise UsageError(
                f"{name}={given[name]} is for a new model, and model_name_or_path={model!r} has a shape of its own: "
                "give one of them"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """A checkpoint to convert."""

    positionals: ClassVar[tuple[str, ...]] = ("source", "destination")

    source: str = option(
        REQUIRED, "model folder, Hub id, or file of weights", names="model_or_weights", metavar="SOURCE"
    )
    destination: str = option(
        REQUIRED, "folder to write; it must be empty or not exist yet", names="new_folder", metavar="DESTINATION"
    )
    layout: Layout | None = option(
        None,
        "gpt2, llama, qwen3: from a folder or Hub id with such a model; gpt2, nanogpt, kit (hand-written), gpt-kit "
        "(this package): from a file of weights with these names (safetensors, or a pickle that holds only tensors); "
        "to-gpt2: from a folder of this package to GPT-2",
        unset="by the config.json of a folder of another program",
    )
    n_head: int | None = option(
        None, "number of attention heads (files of weights)", minimum=1, unset="what the file of weights says"
    )
    hidden_act: Activation | None = option(None, "activation function (files of weights)", unset="that of the layout")
    eos_token_id: int | None = option(
        None,
        "token id of the end of text (files of weights)",
        minimum=0,
        unset="what the tokenizer says, if there is one",
    )
    lora_scaling: float | None = option(
        None,
        "factor of the product of LoRA matrices, which are then merged (files of weights): lora_alpha / r for PEFT, "
        "often alpha for a hand-written layer",
        unset="LoRA matrices are refused",
    )
    drop_classifier: bool = option(
        False, "leave out a classification head, for a language model; without it the model becomes a classifier"
    )
    tokenizer_folder: str | None = option(
        None, "folder of a tokenizer to use", unset="the source's", names="folder", metavar="FOLDER"
    )
