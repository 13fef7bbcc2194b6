"""Tokenizers. Imports no torch.

`encodings`: tiktoken encodings (gpt2, bytes, a BPE trained on a corpus), and text to ids and back. `export`: an
encoding as the `tokenizer.json` that `AutoTokenizer` loads, and back. `chat_templates`: chat templates with generation
marks, and the check of a template.
"""
