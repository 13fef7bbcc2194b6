"""Checkpoints of other programs: `layouts` maps the tensor names of GPT-2, nanoGPT and others to this model's; with it
`conversion` reads and writes GPT-2 folders, and `state_dicts` builds a model from a file of weights, which
`weight_files` reads, undoing what training tools wrap around a model.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversion": ["convert_checkpoint", "load_gpt2_checkpoint", "save_as_gpt2"],
    },
)
