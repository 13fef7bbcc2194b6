"""The causal GPT: configuration, modules, losses, presets, registration, and conversion of other checkpoints.

`modeling_gpt_kit` holds the modules, the complete model and its classification heads, `configuration_gpt_kit` the
configuration, `chunked_loss` the cross entropy without full logits, `packed_documents` positions and the attention
masks of packed rows. These four files are copied into saved model folders as remote code, so they import nothing else
of this package. `presets` builds configurations by name (the table of named sizes is in `options/model.py`),
`registration` adds the model to the Auto classes of transformers, `own_class` recognises a model whose class came
with a folder, `losses` computes batch and step losses. `layouts` maps the tensor names of GPT-2, nanoGPT and others
to this model's; with it `conversion` reads and writes GPT-2 folders, and `state_dicts` builds a model from a file of
weights, which `weight_files` reads, undoing what training tools wrap around a model. `kit_names` holds the kit's
names for parts of the model.
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
            "GPTKitForQuestionAnswering",
            "GPTKitForSequenceClassification",
            "GPTKitForTokenClassification",
            "GPTKitModel",
            "GPTKitPreTrainedModel",
            "MultiHeadAttention",
            "TransformerBlock",
        ],
        "presets": ["create_model_config"],
    },
)
