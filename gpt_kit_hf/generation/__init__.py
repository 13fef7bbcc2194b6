"""Text generation.

`generate` samples token ids (temperature, top-k) and streams text; `fast_decoder` is the forward pass with packed
weights and a cache of fixed size; `chat` is a conversation in a terminal. `completion` adds what a server's requests
need (top-p, penalties, log-probabilities, stop strings), and `token_bytes` spells single tokens; `server` serves a
model over HTTP, and `openai_api/` is the API that it speaks.
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
