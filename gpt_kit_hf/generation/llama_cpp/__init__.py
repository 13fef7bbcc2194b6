"""llama.cpp as an engine: GGUF files, run by the package xllamacpp (the extra "llama").

`server` runs llama.cpp in this process; `vocabulary` is the tokenizer in a file; `model` answers a server's requests,
and `text` continues the text of a terminal; `source` finds or writes the file of a model; `compare` holds a file
against the model that it was written from.
"""
