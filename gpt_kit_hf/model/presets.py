"""Configurations of published and small GPT sizes by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from gpt_kit_hf.errors import UsageError, one_line, unknown_name
from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.options.model import PRESET_KEYS, PRESETS, ModelOptions, preset_key

_GPT2_VOCABULARY = 50257
_GPT2_EOS_TOKEN_ID = 50256


def create_model_config(name: str, *, dropout: float | None = None, **overrides: Any) -> GPTKitConfig:
    """Return the configuration of a preset, given by its full name or its key ("gpt2-small"), with fields overridden.

    `dropout` sets the three dropout probabilities. Raises UsageError, a ValueError, for an unknown name or field, with
    the nearest known one, and for a value that breaks a rule of the configuration.
    """
    key = preset_key(name)
    if key not in PRESET_KEYS:
        raise UsageError(unknown_name("model preset", name, PRESET_KEYS))
    values: dict[str, Any] = next(dict(shape) for full, shape in PRESETS.items() if full.startswith(f"{key} "))
    for given in list(overrides):
        values.pop(GPTKitConfig.attribute_map.get(given, given), None)
    if values.get("vocab_size") == _GPT2_VOCABULARY:
        values |= {"bos_token_id": _GPT2_EOS_TOKEN_ID, "eos_token_id": _GPT2_EOS_TOKEN_ID}
    if dropout is not None:
        values |= {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
    try:
        return GPTKitConfig(**{**values, **overrides})
    except (StrictDataclassError, ValueError) as error:
        raise UsageError(config_error_message(error)) from None


def config_error_message(error: Exception) -> str:
    """Return what a configuration error says, without the wrapper that `strict` adds to the error of a rule."""
    return one_line(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)


def build_config(options: ModelOptions, **from_data: Any) -> GPTKitConfig:
    """Return the configuration that the options ask for; `from_data` are fields that data and encoding decide."""
    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    overrides = {name: value for name, value in given.items() if name not in ("model", "model_name_or_path")}
    if (theta := overrides.pop("rope_theta", None)) is not None:
        overrides["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return create_model_config(options.model, **{**from_data, **overrides})
