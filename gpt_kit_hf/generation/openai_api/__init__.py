"""OpenAI's HTTP API for one model, as an ASGI application.

`app`: the endpoints. `protocol`: the requests of chat completions and completions, validated; `responses`: those of
the responses endpoint. `messages`: the prompt of a chat. `answers`: the answers and errors in OpenAI's form. `jobs`:
requests in threads, queued, cancelled and streamed.
"""
