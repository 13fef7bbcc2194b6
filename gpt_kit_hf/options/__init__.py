"""The options of every command, each declared once: standard library only.

`declare` defines what a declaration holds; `training`, `model`, `data`, `finetuning`, `generation`, `evaluation`,
`hub` and `conversion` declare the options; `run` puts those of a training run together and has the rules for resuming
one; `parser` reads a command line and a YAML file, `pages` writes help and documentation, `files` checks named files.
"""
