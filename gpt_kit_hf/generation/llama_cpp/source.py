"""The GGUF file of a model: the file itself, or a temporary one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.options.generation import DecodingDtype
from gpt_kit_hf.storage.gguf_header import is_gguf


@contextmanager
def gguf_file(place: str, dtype: DecodingDtype = "auto") -> Iterator[Path]:
    """Yield a GGUF file, or write one of the model of a folder or Hub repository, which is there within the block."""
    if is_gguf(Path(place)):
        yield Path(place)
        return
    raise UsageError(f"{place!r} is no GGUF file")
