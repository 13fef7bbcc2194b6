"""Checkpoints of other programs: `layouts` maps the tensor names of GPT-2, Llama, nanoGPT and others to this model's.

With it `conversion` reads folders of transformers, whose configurations `gpt2` and `llama` translate in both
directions. `state_dicts` builds a model from a file of weights, which `weight_files` reads, undoing what training
tools wrap around a model. `folders` finds folders, and writes them as a whole or not at all.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversion": ["convert_checkpoint", "load_gpt2_checkpoint", "save_as_gpt2"],
    },
)
