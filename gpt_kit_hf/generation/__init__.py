"""Text generation: `generate` for token ids and streamed text, `fast_decoder` with packed weights and a cache of fixed
size, `chat` for conversations in a terminal.

`server` is the HTTP server by OpenAI's API. `openai_app` holds its endpoints, `openai_protocol` and `openai_responses`
the requests that they accept, `openai_messages` the prompt of a chat, `openai_answers` the form of the answers. `jobs`
runs the requests in threads; `completion` generates the answers, and `token_bytes` spells their tokens.
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
