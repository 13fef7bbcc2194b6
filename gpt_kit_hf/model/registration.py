"""Makes the GPT known to the transformers library, as if it had been written inside it."""

from __future__ import annotations

from types import ModuleType

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from gpt_kit_hf.model.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM, GPTKitModel


def register() -> None:
    """Register configuration and models with the Auto classes; a second call changes nothing."""
    AutoConfig.register(GPTKitConfig.model_type, GPTKitConfig, exist_ok=True)
    AutoModel.register(GPTKitConfig, GPTKitModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTKitConfig, GPTKitForCausalLM, exist_ok=True)

    # Saved folders carry the code, so that they load where this package is not installed.
    GPTKitConfig.register_for_auto_class("AutoConfig")
    GPTKitModel.register_for_auto_class("AutoModel")
    GPTKitForCausalLM.register_for_auto_class("AutoModelForCausalLM")

    # Trainer's label smoothing and the text-generation pipeline look class names up in these static tables; the common
    # model tests do so to know which class has no loss.
    MODEL_MAPPING_NAMES[GPTKitConfig.model_type] = GPTKitModel.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GPTKitConfig.model_type] = GPTKitForCausalLM.__name__
    # Servers look the architecture of a config.json up as an attribute of the library. While it is imported, it
    # replaces its own module object, so that whoever imported it first holds another: what they share is the class.
    owner = transformers if type(transformers) is ModuleType else type(transformers)
    for cls in (GPTKitConfig, GPTKitModel, GPTKitForCausalLM):
        setattr(owner, cls.__name__, cls)
