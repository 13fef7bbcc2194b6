"""Requests and errors in the form of OpenAI's API.

A parameter that has no effect here is refused unless it is one of the fields of `Harmless`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from gpt_kit_hf.errors import one_line, unknown_name

_MAX_CHOICES, MAX_TOP_LOGPROBS = 128, 20
_SHOWN_CHARACTERS = 60  # of a wrong value, in an error message


class ApiError(Exception):
    """A request that is refused, as OpenAI's API refuses it: status, message, name of the parameter, code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self._param, self._code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self._param, "code": self._code}}


# --- requests


def _one_or_many(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return texts


def _prompts(value: Any) -> list[str | list[int]]:
    def are_ids(items: Any) -> bool:
        return isinstance(items, list) and bool(items) and all(type(item) is int for item in items)

    if isinstance(value, str) or are_ids(value):
        return [value]
    is_list = isinstance(value, list) and bool(value)
    if is_list and (all(isinstance(item, str) for item in value) or all(are_ids(item) for item in value)):
        return list(value)
    raise ValueError("must be a text, a list of texts, a list of token ids or a list of lists of token ids")


def _joined_text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("must be a text or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"has a part of type {kind!r}; only text is supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("has a part without a text")
    return "\n".join(part["text"] for part in content)


class Strict(BaseModel):
    """An object without unknown fields, whose numbers are no texts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    """A message of a chat; fields that are not declared here are for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, PlainValidator(_joined_text)] = None


class TextFormat(Strict):
    """The format of an answer: text."""

    type: Literal["text"]


class _StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Harmless(Strict):
    """Fields that describe a request and change no answer."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class SamplingRequest(Harmless):
    """The parameters that chat completions and completions share."""

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], PlainValidator(_one_or_many)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def model_post_init(self, _: Any) -> None:
        """Refuse parameters that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options is allowed only with stream=true", param="stream_options")

    @property
    def new_tokens(self) -> int | None:
        """The most tokens to generate, None for as many as there is room for."""
        raise NotImplementedError

    @property
    def scored(self) -> int | None:
        """The number of most likely tokens to report beside each token, None for no log-probabilities."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Nothing: TypeAlias = Annotated[list[Any], Field(max_length=0)]


class ChatRequest(SamplingRequest):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: TextFormat | None = None
    # Nothing but the value that asks for nothing is supported.
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: None = None
    functions: Nothing | None = None
    function_call: Literal["none"] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None

    def model_post_init(self, _: Any) -> None:
        """Refuse parameters that contradict each other."""
        super().model_post_init(_)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError("max_tokens and max_completion_tokens: give one of them", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs is allowed only with logprobs=true", param="top_logprobs")

    @property
    def new_tokens(self) -> int | None:
        """The most tokens to generate, None for as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scored(self) -> int | None:
        """The number of most likely tokens to report beside each token, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """A request to /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: None = None

    def model_post_init(self, _: Any) -> None:
        """Refuse parameters that contradict each other."""
        super().model_post_init(_)
        if self.best_of not in (None, self.n or 1):
            raise ApiError(
                f"best_of={self.best_of} is not supported unless it equals n={self.n or 1}",
                param="best_of",
                code="unsupported_value",
            )

    @property
    def new_tokens(self) -> int | None:
        """The most tokens to generate, None for as many as there is room for."""
        return self.max_tokens

    @property
    def scored(self) -> int | None:
        """The number of most likely tokens to report beside each token, None for no log-probabilities."""
        return self.logprobs


Request = TypeVar("Request", bound=BaseModel)


def parse_request(kind: type[Request], body: bytes) -> Request:
    """Return the request in a body. Raises ApiError, which names the first parameter that is wrong."""
    with refusing(kind):
        return kind.model_validate_json(body)


@contextmanager
def refusing(kind: type[BaseModel]) -> Iterator[None]:
    """Raise ApiError for a request of this kind that fails validation."""
    try:
        yield
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _refusal(kind: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    reason, place = first["type"], first["loc"]
    param = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in place if each != "[key]")[1:]
    value = repr(first["input"])
    shown = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}..."
    if reason == "json_invalid":
        return ApiError(f"the body is not valid JSON: {first['ctx']['error']}")
    if not place:
        return ApiError(f"the body must be a JSON object, got {shown}")
    if reason == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
    if reason == "extra_forbidden":
        similar = unknown_name("parameter", param, kind.model_fields)
        message = similar if "did you mean" in similar else f"unknown parameter {param!r}: leave it out"
        return ApiError(message, param=param, code="unknown_parameter")
    if reason in ("none_required", "too_long"):
        return ApiError(f"{param} is not supported by this server", param=param, code="unsupported_parameter")
    if reason == "literal_error":
        message = f"{param}={shown} is not supported by this server; supported: {first['ctx']['expected']}"
        return ApiError(message, param=param, code="unsupported_value")
    rule = re.sub("^Value error, | after validation.*", "", re.sub("^(Input|List) should", "must", first["msg"]))
    return ApiError(one_line(f"{param}={shown} {rule}"), param=param, code="invalid_value")
