"""The options of every command, each declared once: standard library only.

`declare` defines what a declaration holds; `training`, `model`, `data`, `finetuning`, `generation`, `evaluation`,
`hub` and `conversion` declare the options; `run` puts those of a training run together and has the rules for resuming
one; `parser` reads a command line and a YAML file, `pages` writes help and documentation, `files` checks named files.
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
