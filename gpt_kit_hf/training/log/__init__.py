"""What a run tells: `console` writes lines of text or JSON, `live` the view of the progress on a terminal, `messages`
the lines of its beginning and end, `run_log` run.json, metrics.jsonl and the entries of trackers, which `trackers`
chooses. `pace` measures speed and memory, and `curve` draws the loss.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run_log": ["RunResult"],
    },
)
