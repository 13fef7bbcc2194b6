"""Registration of the GPT with the transformers library."""

from __future__ import annotations

from types import ModuleType

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM, GPTKitModel


def register() -> None:
    """Register configuration and models with the Auto classes; a second call has no effect."""
    AutoConfig.register(GPTKitConfig.model_type, GPTKitConfig, exist_ok=True)
    AutoModel.register(GPTKitConfig, GPTKitModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTKitConfig, GPTKitForCausalLM, exist_ok=True)

    # Saved folders include the code, so that they load where this package is not installed.
    GPTKitConfig.register_for_auto_class("AutoConfig")
    GPTKitModel.register_for_auto_class("AutoModel")
    GPTKitForCausalLM.register_for_auto_class("AutoModelForCausalLM")

    # `register` does not add to these static tables. Trainer's label smoothing and the text-generation pipeline look
    # class names up here, and the common model tests use them to find the classes without a loss.
    MODEL_MAPPING_NAMES[GPTKitConfig.model_type] = GPTKitModel.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GPTKitConfig.model_type] = GPTKitForCausalLM.__name__


def add_to_transformers_namespace() -> None:
    """Make the classes attributes of `transformers`, for servers that run in this process.

    vLLM and `transformers serve` look the architecture of a config.json up as an attribute of the library. Nothing in
    this package needs it, so it is not done at import.
    """
    # transformers replaces its own module object while it is imported, so other modules may hold another object than
    # this one. All of these objects share their class.
    owner = transformers if type(transformers) is ModuleType else type(transformers)
    for cls in (GPTKitConfig, GPTKitModel, GPTKitForCausalLM):
        setattr(owner, cls.__name__, cls)
