"""The contents of a training checkpoint.

`training_state` collects and restores weights, optimizer state, loss scale and data position; `optimizer_state`
converts an optimizer's state to named tensors and JSON; `sharded_state` handles a model sharded by FSDP2, and
`sharded_saves` connects its processes for a save; `host_copies` copies to host memory; `checkpoint_writer` saves in a
background thread; `batch_digests` hashes the samples of each batch.
"""
