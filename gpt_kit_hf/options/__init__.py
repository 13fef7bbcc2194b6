"""The options of every command, each declared once, in modules that need only the standard library.

`declare` defines what a declaration holds; `training`, `model`, `data`, `finetuning`, `generation`, `evaluation` and
`hub` declare the options. `run` combines those of a training run and has the rules for resuming one. `parser` reads a
command line, `config_file` a YAML file; `pages` writes help and documentation, `files` checks that named files exist.
"""
