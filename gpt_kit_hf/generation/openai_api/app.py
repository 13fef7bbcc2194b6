"""The endpoints of OpenAI's API for one model."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gpt_kit_hf.generation.completion import Chunk, Sampling
from gpt_kit_hf.generation.engine import CompletionEngine
from gpt_kit_hf.generation.http_server import run_until_signal
from gpt_kit_hf.generation.openai_api.answers import Answer, ChatAnswer, CompletionAnswer
from gpt_kit_hf.generation.openai_api.jobs import EventStream, Jobs, RequestId, Work, collect, internal_error
from gpt_kit_hf.generation.openai_api.messages import render_prompt
from gpt_kit_hf.generation.openai_api.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    parse_request,
    refusing,
)
from gpt_kit_hf.generation.openai_api.responses import ResponsesAnswer, ResponsesRequest

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Requests that are computed at once; others wait for their turn.
JOBS_AT_ONCE = 4
# Where neither the request nor a context limits an answer.
_DEFAULT_NEW_TOKENS = 1024
_CLIENT_CLOSED_REQUEST = 499
_SHUTDOWN_SECONDS = 5  # for the answers that are on their way


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How tokens are chosen for a request that leaves it open."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    @classmethod
    def of(cls, config: GenerationConfig) -> Defaults:
        """Return the defaults that a model's generation config names, else those of OpenAI's API."""
        named = {"temperature": config.temperature, "top_k": config.top_k or None, "top_p": config.top_p}
        if config.do_sample is False:
            named = {"temperature": 0.0}
        return cls(**{name: value for name, value in named.items() if value is not None})


class _Prompt(NamedTuple):
    ids: list[int]
    text: str  # what `echo` repeats
    n_added: int  # tokens at the start that the tokenizer added: they are no part of the text
    sampling: Sampling


class OpenAIServer:
    """Answers to requests; `app` returns the application."""

    def __init__(self, name: str, model: CompletionEngine, defaults: Defaults) -> None:
        self._name, self._model, self._defaults = name, model, defaults
        self._created = int(time.time())
        self._jobs = Jobs(JOBS_AT_ONCE)

    def app(self, cors_allow_origins: Sequence[str] = ()) -> Starlette:
        """Return the application; web pages from `cors_allow_origins` may use it, from any origin with "*"."""
        cors = Middleware(
            CORSMiddleware, allow_origins=list(cors_allow_origins), allow_methods=["*"], allow_headers=["*"]
        )
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/responses", self._respond, methods=["POST"]),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name:path}", self._show_model),
                Route("/health", _health),
            ],
            middleware=[Middleware(RequestId), *([cors] if cors_allow_origins else [])],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_address, Exception: _fail},
        )

    def run(self, listener: socket.socket, cors_allow_origins: Sequence[str] = ()) -> None:
        """Answer requests until SIGINT or SIGTERM."""
        app = self.app(cors_allow_origins)
        run_until_signal(app, listener, seconds=_SHUTDOWN_SECONDS, stop_jobs=self._jobs.stop)

    async def _list_models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def _show_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._created, "owned_by": "gpt-kit"}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            message = f"the model {name!r} does not exist; this server serves {self._name!r}"
            raise ApiError(message, param="model", code="model_not_found", status=404)

    async def _chat(self, request: Request) -> Response:
        asked = parse_request(ChatRequest, await request.body())
        self._check_model(asked.model)
        return await self._answer(request, asked, [self._chat_prompt(asked, "messages")], ChatAnswer)

    async def _respond(self, request: Request) -> Response:
        asked = parse_request(ResponsesRequest, await request.body())
        self._check_model(asked.model)
        with refusing(ResponsesRequest):
            chat = asked.as_chat()
        return await self._answer(request, chat, [self._chat_prompt(chat, "input")], ResponsesAnswer)

    def _chat_prompt(self, asked: ChatRequest, param: str) -> _Prompt:
        text = render_prompt(self._model.tokenizer, asked.messages)
        ids = self._model.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return self._prompt(asked, param, ids, text)

    async def _complete(self, request: Request) -> Response:
        asked = parse_request(CompletionRequest, await request.body())
        self._check_model(asked.model)
        prompts = [self._completion_prompt(asked, prompt) for prompt in asked.prompt]
        return await self._answer(request, asked, prompts, CompletionAnswer)

    async def _answer(
        self, request: Request, asked: SamplingRequest, prompts: list[_Prompt], form: type[Answer]
    ) -> Response:
        n_tokens, n_choices = sum(len(prompt.ids) for prompt in prompts), len(prompts) * (asked.n or 1)
        answer = form(self._name, asked, n_tokens, n_choices)
        job = self._jobs.start(self._work(asked, prompts))
        if asked.stream:
            return EventStream(job, answer)
        if await collect(request, job, answer):
            return JSONResponse(answer.whole())
        return Response(status_code=_CLIENT_CLOSED_REQUEST)  # nobody reads it

    def _completion_prompt(self, asked: CompletionRequest, prompt: str | list[int]) -> _Prompt:
        tokenizer = self._model.tokenizer
        if not isinstance(prompt, str):
            checked = self._prompt(asked, "prompt", prompt, "")
            return checked._replace(text=self._model.decode(prompt))
        ids = tokenizer.encode(prompt, verbose=False)
        plain = tokenizer.encode(prompt, add_special_tokens=False, verbose=False)
        n_added = len(ids) - len(plain)
        return self._prompt(asked, "prompt", ids, prompt, n_added if ids[n_added:] == plain else 0)

    def _prompt(self, asked: SamplingRequest, param: str, ids: list[int], text: str, n_added: int = 0) -> _Prompt:
        """Return a prompt, checked, with its sampling."""
        if not ids:
            raise ApiError("the prompt is empty", param=param)
        n_vocabulary, context = self._model.vocabulary_size, self._model.context_length
        for name, values in ((param, ids), ("logit_bias", asked.logit_bias or {})):
            if (wrong := next((i for i in values if not 0 <= i < n_vocabulary), None)) is not None:
                raise ApiError(f"{name} holds {wrong}; token ids are from 0 to below {n_vocabulary}", param=name)
        if asked.top_k is not None and asked.top_k > n_vocabulary:
            raise ApiError(f"top_k={asked.top_k}: from 1 to vocab_size={n_vocabulary}", param="top_k")
        wanted = asked.new_tokens
        if context is not None:
            room = context - len(ids)
            if room < (0 if wanted == 0 else 1):
                message = f"the prompt has {len(ids)} tokens; the model's context of {context} leaves no room"
                raise ApiError(message, param=param, code="context_length_exceeded")
            wanted = room if wanted is None else min(wanted, room)
        return _Prompt(ids, text, n_added, self._sampling(asked, _DEFAULT_NEW_TOKENS if wanted is None else wanted))

    def _sampling(self, asked: SamplingRequest, max_new_tokens: int) -> Sampling:
        defaults = self._defaults
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=defaults.temperature if asked.temperature is None else asked.temperature,
            top_k=defaults.top_k if asked.top_k is None else asked.top_k,
            top_p=defaults.top_p if asked.top_p is None else asked.top_p,
            frequency_penalty=asked.frequency_penalty or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            logit_bias=asked.logit_bias or {},
            seed=asked.seed,
            stop=asked.stop or (),
            top_logprobs=asked.scored,
        )

    def _work(self, asked: SamplingRequest, prompts: list[_Prompt]) -> Work:
        """Return what a thread does for a request; choices are numbered by prompt, then by choice."""
        n, is_echo = asked.n or 1, isinstance(asked, CompletionRequest) and bool(asked.echo)

        def work(on_chunk: Callable[[Chunk], None], is_cancelled: Callable[[], bool]) -> None:
            for number, prompt in enumerate(prompts):
                put, first = on_chunk, number * n
                if is_echo:
                    echoed = self._echo(prompt)
                    for choice in range(first, first + n):
                        on_chunk(echoed._replace(choice=choice))
                    put = _after(len(prompt.text), on_chunk)
                self._model.complete(prompt.ids, n, prompt.sampling, put, first_index=first, is_cancelled=is_cancelled)
                if is_cancelled():
                    return

        return work

    def _echo(self, prompt: _Prompt) -> Chunk:
        top = prompt.sampling.top_logprobs
        if top is None:
            return Chunk(0, prompt.text, [], 0, None)
        tokens = self._model.score(prompt.ids, top)
        added = tokens[prompt.n_added].offset if prompt.n_added < len(tokens) else 0
        shifted = [token._replace(offset=max(0, token.offset - added)) for token in tokens]
        return Chunk(0, prompt.text, shifted, 0, None)


def _after(n_characters: int, on_chunk: Callable[[Chunk], None]) -> Callable[[Chunk], None]:
    """Return a function that passes chunks on as parts of a text that begins earlier."""

    def put(chunk: Chunk) -> None:
        tokens = [token._replace(offset=token.offset + n_characters) for token in chunk.tokens]
        on_chunk(chunk._replace(tokens=tokens))

    return put


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status)


async def _refuse_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; the API is at /v1/models, /v1/completions, "
    refusal = ApiError(f"{message}/v1/chat/completions and /v1/responses", status=error.status_code)
    return JSONResponse(refusal.body(), status_code=error.status_code, headers=error.headers)


async def _fail(_: Request, error: Exception) -> Response:
    return JSONResponse(internal_error(error).body(), status_code=500)
