"""Training data: text and instruction rows as batches of token ids.

`order` decides which samples each step takes (shuffled, mixed, streamed) and divides a batch among processes. `text`
turns files and datasets into windows of tokens for pretraining; `instructions` turns rows into supervised examples
for finetuning.
"""
