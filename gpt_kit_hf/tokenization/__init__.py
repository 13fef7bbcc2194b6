"""Tokenizers. Imports no torch.

`encodings`: tiktoken encodings (gpt2, bytes, a BPE trained on a corpus), and text to ids and back. `bpe_training`:
the trainer of a BPE, in a process of its own. `export`: an encoding as the `tokenizer.json` that `AutoTokenizer`
loads, and back; it names the special tokens, EOS and padding. `model_encoding`: the tokenizer of any model as an
encoding. `chat_templates`: the text of the chat templates that a model may get, with generation marks, and the check
of a template.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chat_templates": ["check_chat_template", "get_chat_template"],
        "encodings": ["get_encoding", "text_to_token_ids", "token_ids_to_text", "train_bpe"],
        "export": ["load_encoding", "save_tokenizer"],
    },
)
