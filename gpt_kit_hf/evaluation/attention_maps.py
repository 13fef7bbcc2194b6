"""Where each token of a text looks: the weights of attention, by layer and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.generate import check_ids


def attention_weights(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the weights of one plain forward pass, (L, H, T, T): [l, h, t, s] is how much t takes from s <= t.

    They are computed by the "eager" attention, which is put back afterwards: others do not form the weights. The model
    is in eval mode. Raises UsageError for ids outside of the vocabulary, and for a model that does not return weights
    of all its layers.
    """
    check_ids(model, ids)
    with torch.inference_mode(), _eager(model):
        answer = model(
            torch.tensor([list(ids)], device=model.device), use_cache=False, output_attentions=True, return_dict=True
        )
    found = answer.get("attentions")
    if not found or any(each is None or each.ndim != 4 for each in found):
        raise UsageError(f"{type(model).__name__} does not return the weights of its attention")
    return torch.stack([each[0].float().cpu() for each in found])  # L x (1, H, T, T) -> (L, H, T, T)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    previous = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        model.set_attn_implementation("eager")
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{type(model).__name__} cannot show the weights of its attention: {reason}") from None
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
