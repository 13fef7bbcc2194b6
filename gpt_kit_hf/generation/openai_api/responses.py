"""The requests and answers of /v1/responses, which are chats in another form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from gpt_kit_hf.generation.completion import Chunk
from gpt_kit_hf.generation.openai_api.answers import Answer, Json, chat_logprobs
from gpt_kit_hf.generation.openai_api.protocol import (
    MAX_TOP_LOGPROBS,
    ChatRequest,
    Harmless,
    Message,
    Nothing,
    Strict,
    TextFormat,
)

# Fields of the messages of an earlier answer, which tell nothing to the model.
_MARKS = ("id", "type", "status", "phase")


def _input(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text or a list of messages")
    for item in value:
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            kind = item.get("type") if isinstance(item, dict) else item
            raise ValueError(f"has an item of type {kind!r}; only messages are supported")
    return [{name: field for name, field in item.items() if name not in _MARKS} for item in value]


class _Text(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Harmless):
    """A request to /v1/responses."""

    input: Annotated[list[Any], PlainValidator(_input)]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    stream: bool | None = None
    text: _Text | None = None
    # Nothing but the value that asks for nothing is supported.
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: None = None
    max_tool_calls: None = None
    previous_response_id: None = None
    conversation: None = None
    context_management: None = None
    prompt: None = None
    reasoning: None = None
    stream_options: None = None

    def as_chat(self) -> ChatRequest:
        """Return the request for a chat with the same answer. Raises pydantic.ValidationError for a wrong message."""
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        has_logprobs = self.top_logprobs is not None or bool(self.include)
        return ChatRequest(
            messages=[Message.model_validate(item) for item in (*system, *self.input)],
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            logprobs=has_logprobs,
            top_logprobs=(self.top_logprobs or 0) if has_logprobs else None,
            stream=self.stream,
        )


class ResponsesAnswer(Answer):
    """An answer of /v1/responses."""

    prefix = "resp"
    _n_events = 0

    def opening(self) -> Iterator[Json]:
        """Yield that the answer, its message and its text begin."""
        response = self._response("in_progress", [])
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._part_event("response.content_part.added", part=self._part("", []))

    def events(self, chunk: Chunk) -> Iterator[Json]:
        """Yield the text of a chunk."""
        if chunk.text:
            logprobs = self._logprobs(chunk)
            yield self._part_event("response.output_text.delta", delta=chunk.text, logprobs=logprobs)

    def closing(self) -> Iterator[Json]:
        """Yield that the text, its message and the answer are done."""
        whole = self.whole()
        item = whole["output"][0]
        part = item["content"][0]
        yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def whole(self) -> Json:
        """Return the answer that is no stream."""
        (chunk,) = self._joined()
        status = "completed" if chunk.finish_reason == "stop" else "incomplete"
        part = self._part(chunk.text, self._logprobs(chunk))
        usage = {
            "input_tokens": self._n_prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self._n_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._n_prompt_tokens + self._n_tokens,
        }
        return {**self._response(status, [self._item(status, [part])]), "usage": usage}

    def _response(self, status: str, output: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "store": False,
        }

    def _item(self, status: str, content: list[Json]) -> Json:
        identifier = f"msg_{self._id}"
        return {"id": identifier, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, chunk: Chunk) -> list[Json]:
        return [] if self._asked.scored is None else list(chat_logprobs(chunk.tokens)["content"])

    def _part_event(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, item_id=f"msg_{self._id}", output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Json:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **fields}
