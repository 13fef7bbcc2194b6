"""The causal GPT: configuration, modules, loss, presets, and conversion of other checkpoints.

`configuration_gpt_kit`, `modeling_gpt_kit`, `chunked_loss` and `packed_documents` are copied into every saved model
folder as remote code, so they import nothing else of this package.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "configuration_gpt_kit": ["GPTKitConfig"],
        "conversion": ["convert_checkpoint", "load_gpt2_checkpoint", "save_as_gpt2"],
        "kit_names": ["GELU", "GPTModel", "LayerNorm"],
        "losses": ["Batch", "compute_batch_loss", "compute_loader_loss", "train_step_with_gradient_clipping"],
        "modeling_gpt_kit": [
            "FeedForward",
            "GPTKitForCausalLM",
            "GPTKitModel",
            "GPTKitPreTrainedModel",
            "MultiHeadAttention",
            "TransformerBlock",
        ],
        "presets": ["create_model_config"],
    },
)
