"""The options of every command, each declared once, in modules that need only the standard library.

`declare` defines what a declaration holds and checks values against it: type, choices, bounds, and options that
exclude each other. `training` (run, optimizer), `model` (presets, shape, conversion), `data`, `finetuning`,
`generation`, `evaluation`, `hub` and `planning` declare the options. `run` combines those of a training run and has
the rules for resuming one. `parser` reads a command line and a YAML file; `pages` writes help and documentation,
`files` finds the files that globs name and refuses options of text for files of ids.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["EncodingOptions", "RowOptions", "SupervisionOptions", "TextOptions", "WindowOptions"],
        "evaluation": ["ScoreOptions"],
        "finetuning": ["AdapterOptions", "BaseOptions"],
        "generation": ["ChatOptions"],
        "hub": ["PushOptions"],
        "model": ["ModelOptions", "PRESETS"],
        "run": ["FinetuneOptions", "RunOptions", "parse_finetune_options", "parse_run_options"],
        "training": ["OptimizerOptions", "TrainingOptions"],
    },
)
