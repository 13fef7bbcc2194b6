"""Instruction rows, from a file to a batch in which only the answers are targets.

`reader`: rows with their places, from JSON (`json_rows`), CSV, Parquet and datasets. `rows`: a row, its faults, the
names of its fields. `formats`: the fields and text of a row (Alpaca, prompt and completion). `conversations`: turns of
a chat row, and which are trained. `templates`: which chat template writes the prompts. `encoding`: one row as ids and
answer marks. `tokenized`: all rows as arrays, truncated, split, packed. `counts`: rows used and left out. `batches`:
packed or padded rows for torch. `dataset`: the kit's `InstructionDataset` and collate function. `report`: what
training would see of the rows. `inspect`: that report without training. Only `batches` and `dataset` import torch.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batches": ["PackedRows", "PaddedRows"],
        "dataset": ["InstructionDataset", "create_instruction_collate_fn"],
        "formats": ["format_alpaca"],
        "inspect": ["inspect_rows"],
        "reader": ["read_rows"],
        "report": ["SupervisionReport", "inspect_batches", "report_of"],
        "tokenized": ["SupervisedRows", "encode_rows"],
    },
)
