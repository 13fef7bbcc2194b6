"""The model card, the README.md of a model repository.

`card` renders a card and keeps what a person wrote in it; `template.md` is its text; `markdown` shows values safely in
it; `facts` reads what a card may show of a run; `options` selects the options that it may show; `metadata` is the YAML
front matter.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "card": ["card_facts", "render_card", "write_card"],
    },
)
