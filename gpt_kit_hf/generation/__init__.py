"""Text generation: `generate` for token ids and streamed text, `fast_decoder` with packed weights and a cache of fixed
size, `chat` for conversations in a terminal, `server` for the OpenAI-compatible HTTP server.
"""
