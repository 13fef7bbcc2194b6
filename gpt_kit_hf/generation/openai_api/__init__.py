"""OpenAI's HTTP API for one model, as an ASGI application.

`app`: the endpoints. `protocol`: the requests of chat completions and completions, validated, and the errors in
OpenAI's form; `responses`: the requests of the responses endpoint. `messages`: the prompt of a chat. `answers`: the
answers in OpenAI's form, whole and streamed. `jobs`: requests in threads, queued and cancelled.
"""
