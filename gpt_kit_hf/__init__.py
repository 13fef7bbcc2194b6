"""A GPT of one's own, from raw text to a published model. Importing registers the model with the Auto classes."""
from gpt_kit_hf.configuration_gpt_kit import GPTKitConfig
from gpt_kit_hf.modeling_gpt_kit import GPTKitForCausalLM, GPTKitModel
GPTModel = GPTKitForCausalLM
