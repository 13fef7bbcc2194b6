"""The command line, a thin layer over the folders below.

`main` is the entry point, with the table of commands and their summaries; `running` runs a command and maps each kind
of error to an exit code; `checks` looks for named files, models and runs before torch is imported. Families: `train`
(train, finetune, verify), `data` (tokenize, inspect), `generate` (generate, chat, serve, play), `evaluate` (evaluate,
check), `publish` (push, pull, card), `runs` (runs, compare), `watch` (watch, report) and `export` (export, convert).
`options_page` writes docs/options.md.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "running": ["run_command"],
    },
)
