"""A GPT of your own, from raw text to a published model.

Importing this package registers the model with the Auto classes of transformers. The public names, which
`__init__.pyi` lists, are loaded when they are first used.

The folders, from the command line down: `commands`, `training` and `pages`, `evaluation`, `generation` and `data`,
`hub`, `export`, `model`, `tokenization` and `storage`, `options`. Below all of them: `errors`, the exceptions and how
an unknown name is worded, and `text`, how numbers and durations are written.
"""

import lazy_loader

from gpt_kit_hf.model.registration import register_when_used

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_when_used()
