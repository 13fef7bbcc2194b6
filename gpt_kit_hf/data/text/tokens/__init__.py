"""Token ids on the disk.

`token_cache` encodes shards of text once and keeps the ids; `token_files` reads the ids that other programs wrote.
`stored_arrays` reads parts of both, and `token_stream` is all of them in order, with the split for evaluation.
"""
