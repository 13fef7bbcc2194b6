"""The causal GPT: configuration, modules, loss, presets, and conversion of other checkpoints.

`configuration_gpt_kit`, `modeling_gpt_kit`, `chunked_loss` and `packed_documents` are copied into every saved model
folder as remote code, so they import nothing else of this package.
"""
