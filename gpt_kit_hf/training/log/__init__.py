"""What a run tells: `console` writes log lines and the progress bar, `run_log` run.json, metrics.jsonl and the entries
of trackers, and `curve` draws the loss.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run_log": ["RunResult"],
    },
)
