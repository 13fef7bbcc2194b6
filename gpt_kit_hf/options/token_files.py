"""Which options of a text do not apply to token files, whose ids another program made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpt_kit_hf.errors import UsageError

# How text is read; evaluation files that are text are read so beside token files, too.
_OF_TEXT = ("text_column", "encoding_of_files", "document_separator", "eos_in_text", "on_bad_text", "num_proc")
_OF_STREAMS = ("streaming", "shuffle_windows", "stream_shards")


def is_token_file(name: str) -> bool:
    """Return whether a name is that of a token file."""
    return name.endswith((".bin", ".ds"))


def check_options_of_ids(given: Mapping[str, object], eval_files: Sequence[str] | None) -> None:
    """Raise UsageError for an option that does not apply to token files; `given` are those that were given."""
    has_text = eval_files is not None and not any(map(is_token_file, eval_files))
    refused = {
        **dict.fromkeys(() if has_text else _OF_TEXT, "is for text, and token_files hold ids"),
        **dict.fromkeys(_OF_STREAMS, "is for a text that is streamed, and token_files are read where they lie"),
        "dataset_train_split": "is for dataset_name, and token_files have no splits",
    }
    for name, value in given.items():
        if name in refused and value is not None:
            raise UsageError(f"{name}={value!r} {refused[name]}: leave it out")
