"""A text that changes a little each time, as one that is being typed or generated: read without starting again."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gpt_kit_hf.errors import StoppedError, UsageError
from gpt_kit_hf.evaluation.token_scores import Beliefs, beliefs_of
from gpt_kit_hf.generation.generate import check_ids, context_length

_TOKENS_AT_ONCE = 256
_WINDOWS_KEPT = 128  # of texts that exceed the context
_REPLACED = "the text was replaced by a newer one"


class Reading(NamedTuple):
    """The ids of a text, T of them, what the model expects after each, and the logits after the last, (V,)."""

    ids: list[int]
    beliefs: Beliefs
    logits: Tensor


class TextReader:
    """Reads texts with one causal model of transformers, in eval mode.

    The keys and values of the last text are kept, and of a new one only what follows their common beginning is
    computed. The numbers are those of a plain forward pass up to rounding. A model whose cache cannot be cut (sliding
    windows, recurrent states) is read from the start each time.
    """

    def __init__(self, model: PreTrainedModel, top: int = 10) -> None:
        self.model, self._top = model, top
        self.context_length = context_length(model)
        self._cache: DynamicCache | None = None
        self._is_cached = "past_key_values" in inspect.signature(model.forward).parameters and _can_be_cut(
            DynamicCache(config=model.config)
        )
        self._last: Reading | None = None
        self._windows: OrderedDict[tuple[int, ...], Beliefs] = OrderedDict()

    def read(self, ids: Sequence[int], stop: Callable[[], bool] = lambda: False) -> Reading:
        """Return the reading of a text.

        `stop` is called before each part of a long text; if it returns true, StoppedError is raised. Raises UsageError
        for no ids, ids outside of the vocabulary, and more than the model has positions.
        """
        ids = list(ids)
        self._check(ids)
        if self._last is not None and self._last.ids == ids:
            return self._last
        start = self._shared(ids)
        kept = None if self._last is None else self._last.beliefs
        # Until it is complete, nothing is known: an error may leave the cache with a part of the text.
        self._last = None
        parts, logits = self._forward(ids, start, stop)
        if kept is not None:
            parts.insert(0, Beliefs(*(each[:start] for each in kept)))
        self._last = Reading(ids, Beliefs(*(torch.cat(each) for each in zip(*parts, strict=True))), logits)
        return self._last

    def read_windows(self, ids: Sequence[int], stop: Callable[[], bool] = lambda: False) -> Reading:
        """Return the reading of a text of any length.

        One that exceeds the model's context is read in windows, as `DocumentWindows` has them with `stride` equal to
        `max_length`: each follows the one before, except for the last, which ends with the text. What comes next is
        expected from as many tokens as the model can read. Raises what `read` raises otherwise.
        """
        ids = list(ids)
        length = self.context_length
        if length is None or len(ids) <= length:
            return self.read(ids, stop)
        parts = []
        for place in range(0, len(ids) - 1, length):
            start = self.window_start(len(ids), place)
            window = self._window(tuple(ids[start : start + length + 1]), stop)
            parts.append(Beliefs(*(each[place - start :] for each in window)))
        last = self.read(ids[-length:], stop)
        parts.append(Beliefs(*(each[-1:] for each in last.beliefs)))
        return Reading(ids, Beliefs(*(torch.cat(each) for each in zip(*parts, strict=True))), last.logits)

    def window_start(self, n_ids: int, place: int) -> int:
        """Return where the window begins from which the token after a place is expected, in a text of `n_ids` ids."""
        length = self.context_length
        if length is None or n_ids <= length:
            return 0
        if place == n_ids - 1:
            return n_ids - length
        return min(place // length * length, n_ids - 1 - length)

    def _window(self, ids: tuple[int, ...], stop: Callable[[], bool]) -> Beliefs:
        """Return what is expected after each id of a window but the last, which is known already."""
        if ids not in self._windows:
            if stop():
                raise StoppedError(_REPLACED)
            self._check(list(ids[:-1]))
            with torch.inference_mode():
                logits = self.model(torch.tensor([ids[:-1]], device=self.model.device), use_cache=False).logits[0]
                self._windows[ids] = beliefs_of(logits, ids[1:], self._top)
        self._windows.move_to_end(ids)
        while len(self._windows) > _WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return self._windows[ids]

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise UsageError("the text is empty, and this model has no token that begins a text")
        check_ids(self.model, ids)
        if self.context_length is not None and len(ids) > self.context_length:
            raise UsageError(
                f"the text has {len(ids)} tokens, more than the model's context, {self.context_length}: shorten it"
            )

    def _shared(self, ids: list[int]) -> int:
        """Return how many tokens at the start need not be computed; the last of those that are equal is one of them.

        Its logits, which score the token after it, were not kept.
        """
        if self._last is None or self._cache is None:
            return 0
        pairs = zip(ids, self._last.ids, strict=False)
        n_equal = next((n for n, (new, old) in enumerate(pairs) if new != old), min(len(ids), len(self._last.ids)))
        return max(0, n_equal - 1)

    def _forward(self, ids: list[int], start: int, stop: Callable[[], bool]) -> tuple[list[Beliefs], Tensor]:
        """Return what is expected after the ids from `start` on, in parts, and the last logits."""
        if start == 0 or self._cache is None:
            self._cache = DynamicCache(config=self.model.config) if self._is_cached else None
        elif (surplus := self._cache.get_seq_length() - start) > 0:
            self._cache.crop(-surplus)
        parts: list[Beliefs] = []
        size = _TOKENS_AT_ONCE if self._is_cached else len(ids)
        for first in range(start, len(ids), size):
            if stop():
                raise StoppedError(_REPLACED)
            rows = self._logits(ids[first : first + size])  # (t, V)
            parts.append(beliefs_of(rows, ids[first + 1 : first + 1 + len(rows)], self._top))
        return parts, rows[-1].float().cpu()

    def _logits(self, ids: list[int]) -> Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if self._cache is not None:
            options = {"use_cache": True, "past_key_values": self._cache}
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([ids], device=self.model.device), **options).logits[0]
        return logits


def _can_be_cut(cache: DynamicCache) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)
