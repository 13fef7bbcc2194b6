"""Text generation.

`generate` samples token ids (temperature, top-k) and streams text; `fast_decoder` is the forward pass with packed
weights and a cache of fixed size; `chat` is a conversation in a terminal. `completion` declares what a server's
requests need of an engine (top-p, penalties, log-probabilities, stop strings); `completion_model` does it with a model
of transformers, and `token_bytes` spells single tokens. `server` serves a model over HTTP by `openai_api/`.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chat": ["Conversation"],
        "generate": ["generate_text_autoregressive", "stream_text"],
    },
)
