"""Other names of parts of the model, as the kit has them."""

from torch.nn import GELU, LayerNorm

from gpt_kit_hf.model.modeling_gpt_kit import GPTKitForCausalLM

__all__ = ["GELU", "GPTModel", "LayerNorm"]

GPTModel = GPTKitForCausalLM
