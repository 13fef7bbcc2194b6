"""The optimizer of a run.

`optimizer` creates AdamW or Muon for a model and computes the learning rate of each step; `muon` holds the combined
Muon and AdamW optimizer and the orthogonalisation of its updates; `owners` divides that work over processes.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "optimizer": ["create_optimizer", "learning_rate_at"],
    },
)
