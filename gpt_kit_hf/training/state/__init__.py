"""The contents of a training checkpoint: weights, optimizer state, data position, digests of batches."""
