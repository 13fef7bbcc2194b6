"""The logit lens: what each layer of a model would say, if the final norm and the output head followed it at once.

Shapes: L layers, T tokens, P positions, D width, V vocabulary size, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.generate import check_ids

# What families of models call the norm after their last layer.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
_ROWS_AT_ONCE = 256  # of logits, which are V numbers each
_PROBE = (0, 1, 0)  # ids with which the parts of a model are tried


class Lens(NamedTuple):
    """The likeliest next tokens by layer and position; row 0 is the embedding, row l the l-th layer."""

    top_ids: Tensor  # (L + 1, P, K)
    top_logprobs: Tensor  # (L + 1, P, K) in nats


class LogitLens:
    """The lens of one causal model of transformers, in eval mode.

    Raises UsageError, with the reason, for a model whose logits are not its output head applied to its final norm.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._norm, self._head = _final_norm(model), _output_head(model)
        with torch.inference_mode():
            hidden, logits = self._run(list(_PROBE))
            said = self._head(self._norm(hidden[-1])).float()
        if said.shape != logits.shape or not torch.allclose(said, logits, rtol=1e-3, atol=1e-3):
            raise UsageError(f"{type(model).__name__} computes more than a norm and an output head after its layers")

    def __call__(self, ids: Sequence[int], positions: Sequence[int], top: int = 5) -> Lens:
        """Return the lens at some positions of a text, by one plain forward pass.

        Raises UsageError for ids outside of the vocabulary.
        """
        check_ids(self._model, ids)
        with torch.inference_mode():
            hidden, _ = self._run(list(ids))
            rows = hidden[:, list(positions)].flatten(0, 1)  # (L + 1, T, D) -> ((L + 1) * P, D)
            parts = [self._likeliest(part, top) for part in torch.split(rows, _ROWS_AT_ONCE)]
        found = [torch.cat(each) for each in zip(*parts, strict=True)]  # ((L + 1) * P, K)
        found = [each.reshape(len(hidden), len(positions), -1) for each in found]
        return Lens(found[0].cpu(), found[1].cpu())  # each (L + 1, P, K)

    def _likeliest(self, hidden: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """(n, D) -> (n, K) ids and log-probabilities."""
        logprobs = self._head(self._norm(hidden)).float().log_softmax(dim=-1)  # (n, V)
        best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        return best.indices, best.values

    def _run(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Return the hidden states before the final norm, (L + 1, T, D), and the logits, (T, V)."""
        before: list[Tensor] = []
        handle = self._norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
        try:
            answer = self._model(
                torch.tensor([ids], device=self._model.device),
                use_cache=False,
                output_hidden_states=True,
                return_dict=True,
            )
        finally:
            handle.remove()
        hidden = answer.get("hidden_states")
        if not hidden or len(before) != 1 or before[0].shape != hidden[-1].shape:
            raise UsageError(f"{type(self._model).__name__} does not return the hidden states of its layers")
        # transformers returns the last one after the norm.
        return torch.cat([*hidden[:-1], before[0]]), answer.logits[0].float()


def _final_norm(model: PreTrainedModel) -> nn.Module:
    inner = model.base_model
    for holder in (inner, inner.get_decoder() if hasattr(inner, "get_decoder") else inner):
        children: dict[str, nn.Module] = dict(holder.named_children())
        for name in _FINAL_NORMS:
            if name in children:
                return children[name]
    raise UsageError(f"{type(model).__name__} has no final norm that is known here ({', '.join(_FINAL_NORMS)})")


def _output_head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UsageError(f"{type(model).__name__} has no output head")
    return head
