"""Positions and masks of padded, packed and cached rows. This file is copied into saved model folders as remote code.

Shapes: B batch size, T tokens of a row, S tokens with the cached ones, D model width. Documents of a packed row are
marked by `position_ids` (B, T) that restart at 0. `past` is the number of cached tokens.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing

LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def count_positions(table: Tensor, length: int, attention_mask: Tensor | None, past: int | Tensor) -> Tensor:
    """Return the positions of `length` tokens after the cached ones: (B, T), or (1, T) without padding.

    `table` (1, max_position_embeddings) holds all positions. Raises ValueError for a row that is longer, and for a
    mask that does not cover the cached tokens.
    """
    padding = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
    if not is_tracing(past if isinstance(past, Tensor) else None):
        total = length + (int(past) if isinstance(past, int) or past.device.type == "cpu" else 0)
        if total > table.shape[1]:
            raise ValueError(f"the sequence has {total} tokens, more than max_position_embeddings={table.shape[1]}")
        if padding is not None and padding.shape[1] < total:
            raise ValueError(f"attention_mask covers {padding.shape[1]} of {total} tokens (with the cached ones)")
    position_ids = table[:, :length] + past  # (1, T)
    if padding is None:
        return position_ids
    # Padding does not advance the position. The value at a padding token does not matter: nothing attends to it.
    positions = (padding.long().cumsum(dim=-1) - 1).clamp(min=0)  # (B, S)
    return positions.gather(1, position_ids.expand(positions.shape[0], -1))  # (B, S) -> (B, T)


def last_tokens(
    hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None
) -> Tensor:
    """Return the position of the last token of each row that is no padding: (B, T, D), ... -> (B, 1).

    `attention_mask` (B, S) tells, else the ids (B, T) that are `pad_token_id`. Raises ValueError for several rows
    with neither.
    """
    rows, length = hidden_states.shape[:2]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        real = attention_mask[:, -length:].to(hidden_states.device)
    elif input_ids is not None and pad_token_id is not None:
        real = (input_ids != pad_token_id).to(hidden_states.device)
    elif rows == 1:
        real = hidden_states.new_ones(1, length)
    else:
        raise ValueError(
            f"where do these {rows} rows end? Give attention_mask (B, T), or set pad_token_id in the configuration"
        )
    return (torch.arange(length, device=real.device) * real.bool()).argmax(dim=-1, keepdim=True)


def select_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the hidden states of the positions that are needed.

    An int keeps that many last positions, 0 all; a tensor (K,) keeps these positions of every row, integers (B, K)
    positions row by row, booleans (B, T) the true positions as (N, D).
    """
    # transformers has a function for this since 5.21; the model also supports earlier versions.
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:, :]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep, :]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def check_ids(ids: Tensor, size: int, name: str, limit: str) -> None:
    """Raise ValueError unless all ids are in 0..size-1; accelerators and traces are not checked."""
    if ids.device.type != "cpu" or ids.numel() == 0 or is_tracing(ids):
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        outside = low if low < 0 else high
        raise ValueError(f"{name} must lie between 0 and {size - 1} ({limit}={size}), got {outside}")


def document_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    past: int | Tensor,
    layer_idx: int,
) -> Any:
    """Return the attention backend's mask: causal, without padding, and separate for each packed document.

    `inputs_embeds` are (B, T, D), `attention_mask` is (B, S) or a mask for the backend, `layer_idx` is the layer whose
    cache is asked for its size.
    """
    if past_key_values is not None and not past_key_values.is_compileable and isinstance(past, int) and past == 0:
        past_key_values = None  # an empty dynamic cache has no effect on the mask
    is_2d = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
    overlay = None
    if position_ids is not None and inputs_embeds.shape[1] > 1 and (attention_mask is None or is_2d):
        if is_2d and not is_tracing(attention_mask) and bool(attention_mask.all()):  # type: ignore[union-attr]
            attention_mask = None  # a mask of ones masks nothing
        if attention_mask is not None or past_key_values is not None:
            overlay = _same_document(position_ids.expand(inputs_embeds.shape[0], -1), attention_mask, past)
    if isinstance(past, Tensor) and config._attn_implementation == "flex_attention":
        past_key_values = _FrozenCacheLengths(past_key_values, past)
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        and_mask_function=overlay,
        layer_idx=layer_idx,
    )


def _same_document(
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


def attends_by_lengths(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    *,
    training: bool,
) -> bool:
    """Return whether attention takes packed documents by their lengths, so that no (T, T) mask is needed.

    FlashAttention does. So does torch's variable-length attention, which takes the place of `sdpa` for half precision
    on a GPU without dropout, padding and cache; there a mask would cost `sdpa` its flash kernel.
    """
    if is_flash_attention_requested(config):
        return True
    device = inputs_embeds.device
    if config._attn_implementation != "sdpa" or device.type != "cuda":
        return False
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else inputs_embeds.dtype
    return (
        half in (torch.float16, torch.bfloat16)
        and attention_mask is None
        and past_key_values is None
        and not (training and config.attn_pdrop > 0)
        and config.head_dim <= 256
        and config.head_dim % 8 == 0
        and _has_flash_kernels(device)
    )


def _has_flash_kernels(device: torch.device) -> bool:
    return (
        find_spec("torch.nn.attention.varlen") is not None  # torch 2.10 has it
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (B, T, H, Dh) of packed documents, each by itself, from torch's flash kernels.

    `query` is (B, H, T, Dh), `key` and `value` are (B, Hk, T, Dh); `cu_seq_lens_q` (N + 1,) are the start offsets of
    the documents in the concatenated rows, and `max_length_q` is at least the length of the longest.
    """
    from torch.nn.attention.varlen import varlen_attn

    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows, heads, length, width = query.shape
    # The rotation may have made query and key float32, which autocast lowers for torch's other attention functions.
    query, key, value = (
        # (B, H, T, Dh) -> (B * T, H, Dh)
        tensor.to(value.dtype).transpose(1, 2).reshape(rows * length, heads, width)
        for tensor in (query, key, value)
    )
    bounds, longest = cu_seq_lens_q, max_length_q
    causal = (-1, 0)  # a window of all earlier tokens
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=causal)
    assert isinstance(output, Tensor)  # without further outputs
    return output.view(rows, length, heads, width), None


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


class _FrozenCacheLengths:
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
