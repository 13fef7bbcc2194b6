"""Completions by a model of transformers: token by token, with penalties and log-probabilities.

Shapes: B rows, T prompt tokens, V vocabulary size.
"""

from __future__ import annotations

import codecs
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt_kit_hf.generation.completion import LOWEST_TEMPERATURE, Choice, Chunk, FinishReason, Sampling, ScoredToken
from gpt_kit_hf.generation.decode_loop import unusable_logits
from gpt_kit_hf.generation.fast_decoder import Decoder, pays, why_not
from gpt_kit_hf.generation.generate import (
    CONTEXT_TOKENS,
    TextStreamer,
    context_length,
    decode_function,
    vocabulary_size,
)
from gpt_kit_hf.generation.token_bytes import TokenBytes

# Choices of one prompt that are generated together: each has a cache of its own.
_ROWS_AT_ONCE = 8


class CompletionModel:
    """A `CompletionEngine` of a model of transformers.

    The model must be in eval mode. Its generation config is replaced by one that leaves every decision to `Sampling`;
    only the EOS ids are taken from it. Its weights must not change any more.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        eos = model.generation_config.eos_token_id
        self.eos_token_ids: list[int] = [eos] if isinstance(eos, int) else list(eos or [])
        model.generation_config = GenerationConfig()
        self.model, self.tokenizer = model, tokenizer
        self.context_length, self.vocabulary_size = context_length(model), vocabulary_size(model)
        self.token_bytes, self.decode = TokenBytes(tokenizer), decode_function(tokenizer)

    def complete(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling,
        on_chunk: Callable[[Chunk], None],
        *,
        first_index: int = 0,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generate choices of a prompt, as `CompletionEngine` says."""
        for start in range(first_index, first_index + n, _ROWS_AT_ONCE):
            indices = range(start, min(start + _ROWS_AT_ONCE, first_index + n))
            answers = [_Answer(self, index, prompt, sampling, on_chunk) for index in indices]
            if sampling.max_new_tokens == 0:
                for answer in answers:
                    on_chunk(Chunk(answer.index, "", [], 0, "length"))
                continue
            ids = torch.tensor([list(prompt)] * len(answers), device=self.model.device)  # (B, T)
            _extend(self.model, ids, sampling.max_new_tokens, _Rows(answers, is_cancelled))
            if is_cancelled():
                return

    def score(self, prompt: Sequence[int], top: int) -> list[ScoredToken]:
        """Return the log-probabilities of the prompt's own tokens, of one plain forward pass."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(prompt)], device=self.model.device), use_cache=False).logits[0]
        scores, tokens = _Scores(self.token_bytes, top), []
        for position, token in enumerate(prompt):
            row = logits[position - 1].float() if position else None
            tokens.append(scores.add(token, list(prompt[:position]), row))
        return tokens


class _Scores:
    """Log-probabilities of the tokens of one text."""

    def __init__(self, token_bytes: TokenBytes, top: int) -> None:
        self._token_bytes, self._top = token_bytes, top
        self._characters, self._offset = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def add(self, token: int, previous: Sequence[int], logits: Tensor | None) -> ScoredToken:
        """Return the score of the next token; `logits`, (V,), are None for the first token of a prompt."""
        spelling, offset = self._token_bytes(token, previous), self._offset
        self._offset += len(self._characters.decode(spelling))
        if logits is None:
            return ScoredToken(spelling, offset, None, [])
        logprobs = logits.log_softmax(dim=-1)
        best = logprobs.topk(min(self._top, len(logprobs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [(self._token_bytes(i, previous), value) for i, value in pairs]
        return ScoredToken(spelling, offset, float(logprobs[token]), top)


class _Answer:
    """One choice while it is generated."""

    def __init__(
        self,
        owner: CompletionModel,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        on_chunk: Callable[[Chunk], None],
    ) -> None:
        self.index, self._choice = index, Choice(index, sampling, on_chunk)
        self._sampling, self._eos = sampling, owner.eos_token_ids
        self._warpers, device = _warpers(sampling), owner.model.device
        seed = secrets.randbits(63) if sampling.seed is None else (sampling.seed + index) % 2**64
        self._generator = torch.Generator(device).manual_seed(seed)
        context = list(prompt[-CONTEXT_TOKENS:])
        self._decoded: list[str] = []
        self._streamer = TextStreamer(owner.decode, context, self._eos, self._decoded.append)
        self._scores = None if sampling.top_logprobs is None else _Scores(owner.token_bytes, sampling.top_logprobs)
        self._previous, self._counts = context, Counter[int]()
        self._n_tokens = 0

    def add_token(self, logits: Tensor) -> int:
        """Choose the next token from logits (V,), report what text is certain, and return the token."""
        token = self._choose(logits)
        is_eos = token in self._eos
        self._n_tokens += 1
        scored = []
        if self._scores is not None and not is_eos:
            scored.append(self._scores.add(token, self._previous, logits))
        self._previous = [*self._previous[1 - CONTEXT_TOKENS :], token]
        self._counts[token] += 1
        self._streamer.put(torch.tensor([token]))
        end: FinishReason | None = "stop" if is_eos else None
        if not is_eos and self._n_tokens == self._sampling.max_new_tokens:
            end = "length"
        if end is not None:
            self._streamer.finish()
        self._choice.add("".join(self._decoded), scored, 1, end)
        self._decoded.clear()
        return token

    @property
    def finished(self) -> bool:
        return self._choice.finished

    def _choose(self, logits: Tensor) -> int:
        if not logits.max().isfinite():  # NaN if one of them is
            raise unusable_logits()
        sampling, scores = self._sampling, logits
        if sampling.logit_bias or sampling.frequency_penalty or sampling.presence_penalty:
            scores = logits.clone()
            for token, bias in sampling.logit_bias.items():
                scores[token] += bias
            for token, count in self._counts.items():
                scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        if sampling.temperature < LOWEST_TEMPERATURE:
            return int(scores.argmax())
        probabilities = self._warpers(None, scores[None]).softmax(dim=-1)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))


def _warpers(sampling: Sampling) -> Any:
    warpers = LogitsProcessorList()
    if sampling.temperature >= LOWEST_TEMPERATURE:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    return warpers


class _Rows:
    """The answers that are generated together, as rows of a batch."""

    def __init__(self, answers: list[_Answer], is_cancelled: Callable[[], bool]) -> None:
        self._answers, self._is_cancelled = answers, is_cancelled

    def add_tokens(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,): the next token of each row; rows that are finished get any."""
        rows = zip(self._answers, logits, strict=True)
        if self._is_cancelled():
            return torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        tokens = [0 if answer.finished else answer.add_token(row.float()) for answer, row in rows]
        return torch.tensor(tokens, device=logits.device)

    def are_finished(self) -> bool:
        return self._is_cancelled() or all(answer.finished for answer in self._answers)


def _extend(model: PreTrainedModel, ids: Tensor, max_new_tokens: int, rows: _Rows) -> None:
    """Predict from (B, T) token by token: with a ``Decoder`` if it supports the model, else by ``generate``."""
    if why_not(model) is None:
        decoder = Decoder(model, keep_packed=True)  # one copy for all requests, however large
        with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
            tokens = rows.add_tokens(decoder.start(ids, ids.shape[1] + max_new_tokens))
            if pays(max_new_tokens) and not rows.are_finished():
                decoder.pack()
            while not rows.are_finished():
                tokens = rows.add_tokens(decoder.step(tokens))
        return
    # One list per call: `generate` is greedy here, and the processor leaves one token to choose.
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False),
        logits_processor=LogitsProcessorList([_ChosenToken(rows)]),
        stopping_criteria=StoppingCriteriaList([_Finished(rows)]),
    )


class _ChosenToken(LogitsProcessor):  # type: ignore[misc]
    """Leave the token that the rows choose as the only one."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self._rows.add_tokens(scores)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class _Finished(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._rows.are_finished(), device=input_ids.device)
