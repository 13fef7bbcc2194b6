"""Files that survive a kill, and the layout of a run folder.

`atomic_files` writes and reads JSON, JSONL and tensors; `checkpoints` saves, verifies and rotates checkpoint folders;
`lock` admits one writer to a run folder, and `processes` tells whether the last one still runs; `run_folder` names its
files and decides whether a run may use it; `run_history` reads the run in it while it is written, by the lines that
`metrics_file` returns; `remote_run` copies a run to a URL and fetches it from there, by the
`file_systems` of fsspec; `digests` computes sizes and hashes of files; `gguf_header` reads what a GGUF file says of
itself.
"""
