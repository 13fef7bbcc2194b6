"""Text generation.

`generate` samples token ids (temperature, top-k) and streams text; `fast_decoder` is the forward pass with packed
weights and a cache of fixed size, with its parts in `decoding_blocks` and `layouts`; `decode_loop` chooses its
tokens one by one, on a GPU by a CUDA graph; `chat` is a conversation in a
terminal. `engine` declares what commands and servers ask of a model, whatever computes it. `completion` holds what a
server's requests need (top-p, penalties, log-probabilities, stop strings); `completion_model` answers them with a
model of transformers, for which `token_bytes` spells single tokens, and `llama_cpp/` with a GGUF file. `server`
serves a model by `openai_api/`; `http_server` is what it shares with the server of `pages/`, and `signals` makes an
interrupt of SIGTERM.
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
