"""Instruction rows, from a file to a batch in which only the answers are targets.

`reader`: rows with their places, from JSON, Parquet and datasets. `formats`: the text or messages of a row (Alpaca,
prompt and completion, chat). `templates`: which chat template writes the prompts. `encoding`: one row as ids and
answer marks. `tokenized`: all rows as arrays, truncated, split, packed. `batches`: packed or padded rows for torch.
`dataset`: the kit's `InstructionDataset` and collate function. `report`: what training would see of the rows.
`inspect`: that report without training. Only `batches` and `dataset` import torch.
"""
