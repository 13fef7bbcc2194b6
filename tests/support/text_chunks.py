"""What the chunks of a text spell."""

from __future__ import annotations

from collections.abc import Iterable

from gpt_kit_hf.data.text.shards import TextChunk


def documents_in(chunks: Iterable[TextChunk]) -> list[str]:
    """The documents that chunks spell, and that the last one is ended."""
    documents, waiting, ends = [], "", True
    for text, ends, _ in chunks:
        waiting += text
        if ends:
            documents.append(waiting)
            waiting = ""
    assert ends, "the last document has no end"
    return documents
