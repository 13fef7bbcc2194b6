"""Text for pretraining, from files and datasets to windows of token ids.

`sources` finds the files and datasets that the options name; `files/` tells what a file is, refuses what is no text,
and converts archives, tables and other encodings. `shards` reads text, JSON Lines and Parquet files in shards,
`dataset_shards` does so for datasets; `documents` decides where a document ends and what is left out. `tokens/` keeps
the ids on the disk, and reads those that other programs wrote; `tokenize` fills the cache before training, in shares.
`corpus` chooses the encoding and puts all together; `report` says what was read. `windows` cuts stored ids into
windows; `streaming` cuts text that is tokenized during training.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "corpus": ["Corpus", "choose_encoding", "prepare_corpus"],
        "tokens.token_stream": ["TokenStream"],
        "windows": ["GPTPretrainingDataset", "TokenWindows", "create_pretraining_dataloader"],
    },
)
