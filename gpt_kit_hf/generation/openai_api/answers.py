"""Answers in the form of OpenAI's API, whole and as the events of a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from gpt_kit_hf.generation.completion import Chunk, ScoredToken
from gpt_kit_hf.generation.openai_api.protocol import SamplingRequest

Json: TypeAlias = dict[str, Any]

# JSON has no infinity; OpenAI writes this number for a token that cannot occur.
_LOWEST_LOGPROB = -9999.0


class Answer(ABC):
    """The answer to one request; `add` collects the chunks of its choices."""

    prefix: ClassVar[str]

    def __init__(self, model: str, asked: SamplingRequest, n_prompt_tokens: int, n_choices: int) -> None:
        self._model, self._asked = model, asked
        self._n_prompt_tokens, self._n_tokens = n_prompt_tokens, 0
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._chunks: list[list[Chunk]] = [[] for _ in range(n_choices)]

    @abstractmethod
    def opening(self) -> Iterator[Json]:
        """Yield the events of a stream before the first chunk."""

    @abstractmethod
    def events(self, chunk: Chunk) -> Iterator[Json]:
        """Yield the events of a stream for a chunk that was added."""

    @abstractmethod
    def closing(self) -> Iterator[Json]:
        """Yield the events of a stream after the last chunk."""

    @abstractmethod
    def whole(self) -> Json:
        """Return the answer that is no stream."""

    def add(self, chunk: Chunk) -> None:
        """Add a part of a choice."""
        self._chunks[chunk.choice].append(chunk)
        self._n_tokens += chunk.n_tokens

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self._n_prompt_tokens,
            "completion_tokens": self._n_tokens,
            "total_tokens": self._n_prompt_tokens + self._n_tokens,
        }

    def _joined(self) -> Iterator[Chunk]:
        """Yield each choice as one chunk."""
        for index, chunks in enumerate(self._chunks):
            text, tokens = "".join(chunk.text for chunk in chunks), [t for chunk in chunks for t in chunk.tokens]
            yield Chunk(index, text, tokens, sum(chunk.n_tokens for chunk in chunks), chunks[-1].finish_reason)


class _ChoicesAnswer(Answer):
    """Answers with a list `choices`."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def opening(self) -> Iterator[Json]:
        yield from ()

    def events(self, chunk: Chunk) -> Iterator[Json]:
        yield self._event([self._choice(chunk, is_part=True)])

    def closing(self) -> Iterator[Json]:
        if self._asked.includes_usage:
            yield self._event([]) | {"usage": self._usage()}

    def whole(self) -> Json:
        choices = [self._choice(chunk, is_part=False) for chunk in self._joined()]
        return {**self._envelope(self.kind), "choices": choices, "usage": self._usage()}

    def _event(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self._asked.includes_usage else {}
        return {**self._envelope(self.chunk_kind), "choices": choices, **usage}

    def _envelope(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    @abstractmethod
    def _choice(self, chunk: Chunk, *, is_part: bool) -> Json:
        """Return the entry of `choices` for a whole choice or a part of it."""


class ChatAnswer(_ChoicesAnswer):
    """An answer of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Iterator[Json]:
        """Yield the role of each choice."""
        for index in range(len(self._chunks)):
            delta = {"role": "assistant", "content": ""}
            yield self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, chunk: Chunk, *, is_part: bool) -> Json:
        logprobs = None if self._asked.scored is None else chat_logprobs(chunk.tokens)
        if is_part:
            content: Json = {"delta": {"content": chunk.text} if chunk.text else {}}
        else:
            content = {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
        return {"index": chunk.choice, **content, "logprobs": logprobs, "finish_reason": chunk.finish_reason}


class CompletionAnswer(_ChoicesAnswer):
    """An answer of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, chunk: Chunk, *, is_part: bool) -> Json:
        logprobs = None if self._asked.scored is None else _completion_logprobs(chunk.tokens)
        return {
            "index": chunk.choice,
            "text": chunk.text,
            "logprobs": logprobs,
            "finish_reason": chunk.finish_reason,
        }


def chat_logprobs(tokens: Sequence[ScoredToken]) -> Json:
    """Return the `logprobs` of a choice of a chat."""

    def entry(spelling: bytes, logprob: float | None) -> Json:
        return {"token": _token_text(spelling), "bytes": list(spelling), "logprob": _number(logprob)}

    content = [
        {**entry(token.spelling, token.logprob), "top_logprobs": [entry(*each) for each in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: Sequence[ScoredToken]) -> Json:
    """Return the `logprobs` of a choice of a completion; the token itself is always among the most likely ones."""

    def top(token: ScoredToken) -> Mapping[str, float | None] | None:
        if token.logprob is None:
            return None
        most_likely = {_token_text(spelling): _number(logprob) for spelling, logprob in token.top}
        return most_likely | {_token_text(token.spelling): _number(token.logprob)}

    return {
        "tokens": [_token_text(token.spelling) for token in tokens],
        "token_logprobs": [_number(token.logprob) for token in tokens],
        "top_logprobs": [top(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST_LOGPROB)


def _token_text(spelling: bytes) -> str:
    """Return a token as text; one that holds a part of a character as "bytes:" and its bytes, as OpenAI does."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
