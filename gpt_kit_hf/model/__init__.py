"""The causal GPT: configuration, modules, losses, presets, registration, and conversion of other checkpoints.

`modeling_gpt_kit` holds the complete model and its classification heads, `transformer_block` its blocks,
`configuration_gpt_kit` the configuration, `chunked_loss` the cross entropy without full logits, `positions` the
embeddings of positions, `packed_documents` positions and the attention masks of packed rows. These six files are
copied into saved model folders as remote code, so they import nothing else of this package. `presets` builds
configurations by name (the table of named sizes is in `options/model.py`), `registration` adds the model to the Auto
classes of transformers, `own_class` recognises a model whose class came with a folder, `losses` computes batch and
step losses. `checkpoints/` reads and writes checkpoints of other programs. `kit_names` holds the kit's names for parts
of the model.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "configuration_gpt_kit": ["GPTKitConfig"],
        "checkpoints.conversion": ["convert_checkpoint", "load_gpt2_checkpoint", "save_as_gpt2"],
        "kit_names": ["GELU", "GPTModel", "LayerNorm"],
        "losses": ["Batch", "compute_batch_loss", "compute_loader_loss", "train_step_with_gradient_clipping"],
        "modeling_gpt_kit": [
            "GPTKitForCausalLM",
            "GPTKitForQuestionAnswering",
            "GPTKitForSequenceClassification",
            "GPTKitForTokenClassification",
            "GPTKitModel",
            "GPTKitPreTrainedModel",
        ],
        "presets": ["create_model_config"],
        "transformer_block": ["FeedForward", "MultiHeadAttention", "TransformerBlock"],
    },
)
