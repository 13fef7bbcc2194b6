"""The configuration of the causal GPT. This file travels into model repositories as remote code."""

# No `from __future__ import annotations` here: `strict` cannot check a field whose type is a string.

import difflib
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# Saving a model writes the entry of its own class only; a repository that loads through every Auto class
# needs all of them, so they are in the configuration from the start.
_AUTO_MAP = {
    "AutoConfig": "configuration_gpt_kit.GPTKitConfig",
    "AutoModel": "modeling_gpt_kit.GPTKitModel",
    "AutoModelForCausalLM": "modeling_gpt_kit.GPTKitForCausalLM",
}

# What transformers itself passes or stores beside the fields. Anything else that is not a field is a mistake.
_HANDLED_BY_TRANSFORMERS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "distributed_config",
        "experts_implementation",
        "is_causal",
    }
    | {"model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config", "quantization_config"}
    | {"tie_last_hidden_states", "torch_dtype", "use_bidirectional_attention"}
)


@strict
class GPTKitConfig(PreTrainedConfig):
    """Shape and hyperparameters of a causal GPT; every assignment is checked.

    The names of the transformers library (`hidden_size`, `num_hidden_layers`, `num_attention_heads`,
    `intermediate_size`) and GPT-2's (`n_positions`, `n_ctx`, `activation_function`) read and write the same values.
    `n_inner` is four times `n_embd` if not given. The dropout probabilities act in training only.

    A wrong type or value raises huggingface_hub's StrictDataclassError with field, value and rule; an unknown
    field, or one given under two names with different values, raises ValueError and suggests the nearest name.
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
    }
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
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
    n_inner: int | None = None
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    position_embedding: Literal["learned", "sinusoidal"] = "learned"
    use_bias: bool = True
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-5
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tokenizer_fingerprint: str | None = None

    def __new__(cls, **kwargs: Any) -> "GPTKitConfig":
        """Refuse a field that is given under two names with different values."""
        # In `__post_init__` it is too late: a field given its default cannot be told from one that was not given.
        _refuse_two_names(kwargs, cls.attribute_map)
        config: GPTKitConfig = super().__new__(cls)
        return config

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        self._refuse_unknown(kwargs)
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        kwargs["auto_map"] = {**_AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a stored dictionary, overridden by `kwargs`; keys that other tools added stay as attributes.

        A key that resembles a field is a slip of the pen and raises, as it does in the constructor, unless the field
        has the same value: some tools write a setting under every name that it has in any model.
        """
        _refuse_two_names(kwargs, cls.attribute_map)
        known = _known_names(cls)
        foreign = {
            key: value
            for key, value in config_dict.items()
            if not key.startswith("_") and key not in known and not _stands_for_a_field(key, config_dict, cls)
        }
        own = {key: value for key, value in config_dict.items() if key not in foreign}
        loaded = super().from_dict(own, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for key, value in foreign.items():
            setattr(config, key, value)
        config.validate()  # the overrides were assigned one by one, which checks types but not rules
        return loaded

    def __setattr__(self, key: str, value: Any) -> None:
        # The base class maps an alias after the field's checks have run under the alias, that is, not at all.
        real = type(self).attribute_map.get(key)
        if real is None:
            super().__setattr__(key, value)
        else:
            setattr(self, real, value)

    def validate_architecture(self) -> None:
        """Check the rules that tie fields together; `strict` calls this after construction."""
        for name in ("vocab_size", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd must be divisible by n_head, got {self.n_embd} and {self.n_head}")
        if self.position_embedding == "sinusoidal" and self.n_embd % 2 != 0:
            raise ValueError(f"n_embd must be even for sinusoidal positions, got {self.n_embd}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        known = _known_names(type(self))
        for key in kwargs:
            if key.startswith("_") or key in known:
                continue
            near = _nearest(key, type(self))
            hint = f"did you mean {near!r}?" if near else f"fields: {', '.join(_own_names(type(self)))}"
            raise ValueError(f"unknown config field {key!r}; {hint}")


def _refuse_two_names(given: dict[str, Any], aliases: dict[str, str]) -> None:
    """Refuse a field that is given under two names with different values."""
    first: dict[str, str] = {}
    for key, value in given.items():
        other = first.setdefault(aliases.get(key, key), key)
        if other != key and given[other] != value:
            raise ValueError(f"{key}={value!r} and {other}={given[other]!r} name the same field: give one of them")


def _own_names(cls: type) -> list[str]:
    return sorted(name for name in cls.__annotations__ if name not in _not_fields())


def _not_fields() -> set[str]:
    return {
        "model_type",
        "keys_to_ignore_at_inference",
        "attribute_map",
        "base_model_tp_plan",
        "base_model_pp_plan",
    }


def _known_names(cls: Any) -> set[str]:
    """Return every name that a constructor call or a stored file may hold."""
    # Old configurations carry generation settings; transformers drops those itself.
    from transformers import GenerationConfig

    generation = GenerationConfig._get_default_generation_params()
    return {field.name for field in fields(cls)} | set(cls.attribute_map) | _HANDLED_BY_TRANSFORMERS | set(generation)


def _nearest(name: str, cls: Any) -> str | None:
    near = difflib.get_close_matches(name, [*_own_names(cls), *cls.attribute_map], n=1, cutoff=0.75)
    return near[0] if near else None


def _stands_for_a_field(name: str, stored: dict[str, Any], cls: Any) -> bool:
    near = _nearest(name, cls)
    fields_stored = {cls.attribute_map.get(key, key): value for key, value in stored.items()}
    return near is not None and fields_stored.get(cls.attribute_map.get(near, near)) != stored[name]


__all__ = ["GPTKitConfig"]
