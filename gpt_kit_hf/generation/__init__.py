"""Text generation: `generate` for Python, the fast decoder, the terminal chat and the HTTP server."""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chat": ["Conversation"],
        "generate": ["generate_text_autoregressive", "stream_text"],
    },
)
