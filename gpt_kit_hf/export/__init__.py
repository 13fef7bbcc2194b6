"""What a model is written as for programs that do not know this package.

`native` writes a folder of transformers' own classes. `gguf_file` writes a file for llama.cpp and compares what was
written; `gguf_shape` has the architectures, sizes and tensors of that file, `gguf_vocabulary` its tokens, and
`modelfile` what Ollama reads beside it.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "gguf_file": ["save_as_gguf"],
        "native": ["save_as_native"],
    },
)
