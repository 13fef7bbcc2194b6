"""What a model is written as for programs that do not know this package.

`native` writes a folder of transformers' own classes.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "native": ["save_as_native"],
    },
)
