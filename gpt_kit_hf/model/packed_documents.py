"""Attention that keeps packed documents apart. This file is copied into saved model folders as remote code.

Shapes: B batch size, T tokens of a row. The documents of a row are marked by `position_ids` (B, T) that restart at 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing


def same_document(
    position_ids: Tensor, attention_mask: Tensor | None, past: int | Tensor
) -> Callable[..., Any] | None:
    """Return a mask function that separates packed documents, or None if no row holds more than one.

    transformers detects packed documents only without padding and without a cache; this function covers both cases.
    """
    document = _documents(position_ids, attention_mask, past)
    if document is None:
        return None
    length = document.shape[1]

    def is_same(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # A static cache is longer than the row. The causal mask hides the rest, but the index must be valid.
        return document[batch_idx, q_idx] == document[batch_idx, kv_idx.clamp(max=length - 1)]

    return is_same


def document_lengths(position_ids: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> dict[str, Any]:
    """Return FlashAttention's arguments for packed documents, or {} if no row holds more than one.

    FlashAttention takes no mask function and detects packing in a single row only. `cu_seq_lens_*` are the start
    offsets of the documents in the concatenated rows; each padding token is a document of its own.
    """
    document = _documents(position_ids, attention_mask, past)
    if document is None or is_tracing(document):  # the number of documents is unknown in a trace
        return {}
    if attention_mask is not None:
        padding_ids = position_ids.max() + 1 + torch.arange(document.shape[1], device=document.device)
        document = torch.where(attention_mask[:, : document.shape[1]].bool(), document, padding_ids)
    starts = nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)  # (B, T)
    offsets = nn.functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=document.numel()).int()
    longest = int(offsets.diff().max())
    return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}


def _documents(position_ids: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> Tensor | None:
    """Return a number per token (B, T) that is equal within a document, or None if no row holds more than one."""
    if isinstance(past, Tensor) and is_tracing(past):
        return None  # a compiled step with a static cache: whether the cache is empty is unknown
    if int(past) > 0:
        return None  # a continued row: which cached tokens belong to its document is unknown
    length = position_ids.shape[1]
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask[:, :length].long()
    # The distance between a token's position and its index among the real tokens; it differs for each document.
    document = (position_ids - (real.cumsum(dim=-1) - 1)) * real  # (B, T)
    return document if is_tracing(document) or bool(document.any()) else None


class FrozenCacheLengths:
    """The sizes of a static cache before the current step, as the mask needs them.

    Flex attention evaluates the mask function after the cache was updated, and a static cache counts its tokens in
    place: every query would then be taken for one `T` positions later.
    """

    def __init__(self, cache: Any, past: Tensor) -> None:
        self.get_mask_sizes = cache.get_mask_sizes
        self.is_compileable = cache.is_compileable
        self.past = past.clone()

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """Return the number of cached tokens before this step, ()."""
        return self.past
