"""The command line: one file for each family of commands, each a thin layer over the folders below."""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "running": ["run_command"],
    },
)
