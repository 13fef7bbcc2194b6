"""The configuration of the causal GPT. This file is copied into saved model folders as remote code."""

# No `from __future__ import annotations` here: `strict` cannot check a field whose type is a string.

import difflib
import math
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

# Saving a model adds only the entry of its own class; a repository needs all to load with every Auto class.
_AUTO_MAP = {
    "AutoConfig": "configuration_gpt_kit.GPTKitConfig",
    "AutoModel": "modeling_gpt_kit.GPTKitModel",
    "AutoModelForCausalLM": "modeling_gpt_kit.GPTKitForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt_kit.GPTKitForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt_kit.GPTKitForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_gpt_kit.GPTKitForQuestionAnswering",
}

_COUNTS = (
    *("vocab_size", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_inner"),
    *("num_key_value_heads", "head_dim"),
)
# Kinds of rotation: the keys of `rope_parameters` that they need, and others that they have.
_ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}


@strict
class GPTKitConfig(PreTrainedConfig):
    """The architecture and hyperparameters of a causal GPT; every assignment is validated.

    The defaults are GPT-2's shape. Today's shape is rotary positions (`position_embedding="rotary"`, with
    transformers' `rope_parameters`), `norm="rmsnorm"`, `mlp="swiglu"`, `qk_norm`, no biases and `zero_init_residual`:
    that is transformers' Qwen3, and without `qk_norm` its Llama. `num_key_value_heads` below `n_head` lets groups of
    heads share keys and values (Ainslie et al. 2023, "GQA").

    The names of the transformers library (`hidden_size`, `num_hidden_layers`, `num_attention_heads`,
    `intermediate_size`) and of GPT-2 (`n_positions`, `n_ctx`, `activation_function`) read and write the same values.
    `n_inner` is 4 * `n_embd` by default; with swiglu, which has three matrices in place of two, 8/3 of `n_embd`,
    rounded up to a multiple of 32. Dropout is applied in training only. `score_bias` adds a bias to the head of
    sequence classification.

    A wrong type or value raises huggingface_hub's StrictDataclassError with field, value and rule. An unknown field,
    and a field given under two names with different values, raise ValueError.
    """

    model_type: ClassVar[str] = "gpt_kit"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "n_positions": "max_position_embeddings",
        "n_ctx": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_eps": "layer_norm_epsilon",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    n_inner: int | None = None
    mlp: Literal["gelu", "swiglu"] = "gelu"
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "silu"] | None = None
    position_embedding: Literal["learned", "sinusoidal", "rotary"] = "learned"
    rope_parameters: dict[str, Any] | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    qk_norm: bool = False
    use_bias: bool = True
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-5
    initializer_range: float | int = 0.02
    zero_init_residual: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    score_bias: bool = False
    tokenizer_fingerprint: str | None = None

    def __new__(cls, **kwargs: Any) -> "GPTKitConfig":
        """Refuse a field that is given under two names with different values."""
        # Not in `__post_init__`: there, a field that was given its default looks like one that was not given.
        _refuse_conflicts(kwargs)
        config: GPTKitConfig = super().__new__(cls)
        return config

    def __post_init__(self, *, _from_file: bool = False, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        kwargs["auto_map"] = {**_AUTO_MAP, **(kwargs.get("auto_map") or {})}
        for key in kwargs:
            if not _from_file and not _is_inherited(key):
                _refuse_unknown(key)
        self._fill_in()
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters  # the older name of transformers
        self.rope_parameters = None if rope is None else dict(rope)
        is_given = rope or kwargs.get("rope_theta")
        super().__post_init__(**kwargs)  # completes rope_parameters in place
        if self.position_embedding != "rotary" and not is_given:
            self.rope_parameters = None

    def _fill_in(self) -> None:
        """Set the fields that were not given and follow from others, and drop the plan of absent modules."""
        for name, value in self._by_heads().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.n_inner is None:
            # A multiple of 32, as the blocks of quantised formats have 32 weights.
            self.n_inner = 4 * self.n_embd if self.mlp == "gelu" else 32 * math.ceil(8 * self.n_embd / (3 * 32))
        if self.hidden_act is None:
            self.hidden_act = "gelu_pytorch_tanh" if self.mlp == "gelu" else "silu"
        absent = [*([] if self.mlp == "swiglu" else ["gate_proj"]), *([] if self.qk_norm else ["q_norm", "k_norm"])]
        plan = type(self).base_model_tp_plan
        present = {name: style for name, style in plan.items() if name.rpartition(".")[2] not in absent}
        self.base_model_tp_plan = present  # type: ignore[misc]  # transformers reads that of the instance

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a stored dictionary, overridden by `kwargs`.

        Keys that other tools or other versions of transformers added are kept as attributes. A key that resembles a
        field is refused as a misspelling, unless it has the value of that field: some tools store a value under every
        name that any model has for it.
        """
        _refuse_conflicts(kwargs)
        values = {cls.attribute_map.get(key, key): value for key, value in config_dict.items()}
        for key, value in config_dict.items():
            near = None if key in _field_names() or _is_inherited(key) else _nearest_field(key)
            if near is not None and values.get(cls.attribute_map.get(near, near)) != value:
                _refuse_unknown(key)
        loaded = super().from_dict({**config_dict, "_from_file": True}, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate()  # the overrides were assigned one by one, which checks types but no rules between fields
        return loaded

    def __setattr__(self, key: str, value: Any) -> None:
        # The base class would validate the value under the alias, which has no rule, before it maps the name.
        field = type(self).attribute_map.get(key)
        if field is not None:
            setattr(self, field, value)
            return
        follows = self._follows_heads() if key in ("n_embd", "n_head") else []
        super().__setattr__(key, value)
        for name in follows:
            super().__setattr__(name, self._by_heads()[name])

    def _by_heads(self) -> dict[str, int]:
        return {"head_dim": self.n_embd // max(self.n_head, 1), "num_key_value_heads": self.n_head}

    def _follows_heads(self) -> list[str]:
        """Return the fields that have the values that `n_embd` and `n_head` give them."""
        return [name for name, value in self._by_heads().items() if getattr(self, name) == value]

    def validate_architecture(self) -> None:
        """Check values and rules between fields; called by `strict` after construction."""
        assert self.num_key_value_heads is not None  # `_fill_in` has set it
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head != 0 and self.head_dim == self.n_embd // self.n_head:
            raise ValueError(f"n_embd must be divisible by n_head, got {self.n_embd} and {self.n_head}")
        if self.n_head % self.num_key_value_heads != 0:
            heads = f"{self.n_head} and {self.num_key_value_heads}"
            raise ValueError(f"n_head must be divisible by num_key_value_heads, got {heads}")
        if (self.mlp == "swiglu") != (self.hidden_act == "silu"):
            raise ValueError(f"hidden_act must be silu with mlp='swiglu' and only then, got {self.hidden_act!r}")
        if self.position_embedding == "sinusoidal" and self.n_embd % 2 != 0:
            raise ValueError(f"n_embd must be even for sinusoidal positions, got {self.n_embd}")
        if self.position_embedding == "rotary":
            self._validate_rotation()
        elif self.rope_parameters:
            raise ValueError(f"rope_parameters need position_embedding='rotary', got {self.position_embedding!r}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def _validate_rotation(self) -> None:
        """Check that the rotation of a token depends on its own position only."""
        if self.head_dim is None or self.head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        given = self.rope_parameters or {}
        kind = given.get("rope_type")
        if kind not in _ROPE_TYPES:
            raise ValueError(
                f"rope_type must be one of {', '.join(_ROPE_TYPES)}, got {kind!r} (dynamic and longrope rotate by the "
                "longest row of a batch, so a row would not give the same result alone)"
            )
        needed, others = _ROPE_TYPES[kind]
        for key in ("rope_theta", *needed):
            least = 1 if key == "factor" else 0
            value = given.get(key)
            if not isinstance(value, (float, int)) or not least <= value < float("inf") or value == 0:
                rule = "at least 1" if least else "above 0"
                raise ValueError(f"rope_parameters: {key} of rope_type={kind!r} must be {rule}, got {value!r}")
        # What transformers keeps beside them: the older name of "rope_type", and a length that not all kinds read.
        known = ("rope_type", "rope_theta", *needed, *others, "type", "original_max_position_embeddings")
        if unknown := [key for key in given if key not in known]:
            raise ValueError(
                f"rope_parameters: rope_type={kind!r} has no {unknown[0]!r}; keys: {', '.join(known[:-2])}"
            )


def _field_names() -> list[str]:
    """Return the names of the fields that this model adds to the base class, and their aliases."""
    own = {field.name for field in fields(GPTKitConfig)} - {field.name for field in fields(PreTrainedConfig)}
    return [*sorted(own), *GPTKitConfig.attribute_map]


def _is_inherited(key: str) -> bool:
    """Return whether the base class takes a key: private state, a field, a property or a generation parameter."""
    if (
        key.startswith("_")
        or key in ("auto_map", "rope_theta")
        or key in {field.name for field in fields(PreTrainedConfig)}
    ):
        return True
    attributes = (getattr(PreTrainedConfig, name, None) for name in (key, f"_{key}"))
    return any(isinstance(it, (property, str)) for it in attributes) or hasattr(GenerationConfig(), key)


def _nearest_field(key: str) -> str | None:
    near = difflib.get_close_matches(key, _field_names(), n=1, cutoff=0.75)
    return near[0] if near else None


def _refuse_unknown(key: str) -> None:
    near = _nearest_field(key)
    own = (name for name in _field_names() if name not in GPTKitConfig.attribute_map)
    hint = f"did you mean {near!r}?" if near else f"fields: {', '.join(own)}"
    raise ValueError(f"unknown config field {key!r}; {hint}")


def _refuse_conflicts(given: dict[str, Any]) -> None:
    """Refuse a field that is given under two names with different values."""
    first: dict[str, str] = {}
    for key, value in given.items():
        other = first.setdefault(GPTKitConfig.attribute_map.get(key, key), key)
        if other != key and given[other] != value:
            raise ValueError(f"{key}={value!r} and {other}={given[other]!r} name the same field: give one of them")


__all__ = ["GPTKitConfig"]
