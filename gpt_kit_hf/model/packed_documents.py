"""Attention that keeps packed documents apart. This file travels into model repositories as remote code.

Shapes: B rows, T tokens of a row. Documents of a row are told by their `position_ids` (B, T), which restart at 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing


def same_document(
    position_ids: Tensor, attention_mask: Tensor | None, past: int | Tensor
) -> Callable[..., Any] | None:
    """Return a mask function that keeps packed documents apart, or None if no row holds more than one.

    transformers finds packed documents only without padding and without a cache; this covers the rest.
    """
    document = _documents(position_ids, attention_mask, past)
    if document is None:
        return None
    length = document.shape[1]

    def is_same(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # A static cache has room beyond this row; causality hides it already, but the index must exist.
        return document[batch_idx, q_idx] == document[batch_idx, kv_idx.clamp(max=length - 1)]

    return is_same


def document_lengths(position_ids: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> dict[str, Any]:
    """Return where packed documents begin, for FlashAttention: it reads no mask function, and one row's packing only.

    `cu_seq_lens_*` count through the rows laid end to end; each padding token is a document of its own.
    """
    document = _documents(position_ids, attention_mask, past)
    if document is None or is_tracing(document):  # how many there are is not known in a trace: they must be given
        return {}
    if attention_mask is not None:
        alone = position_ids.max() + 1 + torch.arange(document.shape[1], device=document.device)
        document = torch.where(attention_mask[:, : document.shape[1]].bool(), document, alone)
    begins = nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)  # (B, T)
    bounds = nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=document.numel()).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _documents(position_ids: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> Tensor | None:
    """Return a number for each token (B, T), equal within a document, or None if no row holds more than one."""
    if isinstance(past, Tensor) and is_tracing(past):
        return None  # a compiled step into a static cache: whether it is still empty is not known
    if int(past) > 0:
        return None  # a continued row: which of the cached tokens belong to its document is not known
    length = position_ids.shape[1]
    real = torch.ones_like(position_ids) if attention_mask is None else attention_mask[:, :length].long()
    # How far a token's position lies from its place among the real tokens: documents that restart at 0 all differ.
    document = (position_ids - (real.cumsum(dim=-1) - 1)) * real  # (B, T)
    return document if is_tracing(document) or bool(document.any()) else None


class FrozenCacheLengths:
    """What the mask asks of a static cache, as it was before this step.

    Flex attention calls the mask's function after the cache has been written, and a static cache counts its tokens
    in place: every query would then be taken for one `T` places later.
    """

    def __init__(self, cache: Any, past: Tensor) -> None:
        self.get_mask_sizes = cache.get_mask_sizes
        self.is_compileable = cache.is_compileable
        self.past = past.clone()

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """Return how many tokens the cache held, ()."""
        return self.past
