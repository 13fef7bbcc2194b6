"""Tokenizers: tiktoken encodings, their exact `tokenizer.json`, and chat templates."""
