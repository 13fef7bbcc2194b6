"""Text generation: `generate` for token ids and streamed text, `fast_decoder` with packed weights and a cache of fixed
size, `chat` for conversations in a terminal, `server` for the OpenAI-compatible HTTP server.
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
