"""Data for training: text and instruction rows as batches of token ids, and the order of samples."""
