"""Answers to a prompt as a server needs them, whatever computes the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]

# Below this temperature the division of the logits could overflow; the most likely token is taken.
LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and where an answer ends.

    A token is drawn from softmax(scores / temperature) of the `top_k` most likely tokens that together reach the
    probability `top_p`; temperature 0 takes the highest score. The score of a token is its logit, plus its
    `logit_bias`, minus `frequency_penalty` for each time that it is in the answer already, minus `presence_penalty` if
    it is. Choice number i of a request with a seed is that of a request for one choice with seed + i.

    `top_logprobs` is the number of most likely tokens to report beside each token; None reports no log-probability.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    top_logprobs: int | None = None


class ScoredToken(NamedTuple):
    """A token of a text, with log-probabilities of the model: log_softmax of its logits, whatever the sampling is.

    `offset` is the place in the text, in characters, where the token starts. The first token of a prompt has no
    `logprob` and an empty `top`, which otherwise lists the most likely tokens as (bytes, log-probability).
    """

    spelling: bytes
    offset: int
    logprob: float | None
    top: list[tuple[bytes, float]]


class Chunk(NamedTuple):
    """A part of a choice; the last one has a `finish_reason`."""

    choice: int
    text: str
    tokens: list[ScoredToken]
    n_tokens: int  # tokens that the model generated for this chunk, those of a stop string and EOS included
    finish_reason: FinishReason | None


class Choice:
    """One choice while it is generated: passes on its text up to the first stop string, and the tokens of the text."""

    def __init__(self, index: int, sampling: Sampling, on_chunk: Callable[[Chunk], None]) -> None:
        self.index, self.finished = index, False
        self._on_chunk, self._stops = on_chunk, _StopStrings(sampling.stop)
        self._n_tokens, self._n_characters = 0, 0
        self._unreported: list[ScoredToken] = []

    def add(self, text: str, tokens: Sequence[ScoredToken], n_tokens: int, end: FinishReason | None) -> None:
        """Add text with its `n_tokens` tokens, of which `tokens` are reported; `end` is why no more will come."""
        self._n_tokens += n_tokens
        self._unreported += tokens
        certain, is_stopped = self._stops.add(text, is_last=end is not None)
        self.finished = end is not None or is_stopped
        if certain or self.finished:
            self._report(certain, is_stopped, "stop" if is_stopped else end)

    def _report(self, text: str, is_stopped: bool, reason: FinishReason | None) -> None:
        self._n_characters += len(text)
        if self.finished and not is_stopped:
            ready, self._unreported = self._unreported, []
        else:  # tokens whose text is held back, or belongs to a stop string, are not part of it
            ready = [token for token in self._unreported if token.offset < self._n_characters]
            self._unreported = self._unreported[len(ready) :]
        n_tokens, self._n_tokens = self._n_tokens, 0
        self._on_chunk(Chunk(self.index, text, ready, n_tokens, reason))


class _StopStrings:
    """Cut a text that arrives in parts before the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""

    def add(self, part: str, *, is_last: bool) -> tuple[str, bool]:
        """Return the text that no stop string can include any more, and whether a stop string was found after it."""
        text = self._held + part
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        starts = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        certain = len(text) - (0 if is_last else max(starts, default=0))
        self._held = text[certain:]
        return text[:certain], False
