"""The page of `gpt-kit play`: what a model believes at each token of a text that is typed or generated."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from gpt_kit_hf.errors import CheckpointError, GPTKitError, StoppedError, UsageError, one_line
from gpt_kit_hf.generation.generate import check_ids
from gpt_kit_hf.pages.chat import Turn, conversation_view, prompt_ids
from gpt_kit_hf.pages.curve_rows import curves
from gpt_kit_hf.pages.models import Models, OpenModel
from gpt_kit_hf.pages.server import Asked, pages_app, read_request, serve_page
from gpt_kit_hf.pages.views import (
    Json,
    added_view,
    attention_view,
    choose_next,
    compare_view,
    lens_view,
    read_view,
    sampling_view,
)
from gpt_kit_hf.pages.work import Stop, Work
from gpt_kit_hf.storage.run_folder import holds_run
from gpt_kit_hf.storage.run_history import RunReader

FILES = {
    "/": "play/page.html",
    "/curve_math.js": "curve_math.js",
    "/curves.js": "curves.js",
    "/curves.css": "curves.css",
    **{
        f"/{name}": f"play/{name}"
        for name in (
            "attention.js",
            "chat.js",
            "compare.js",
            "lens.js",
            "loss.js",
            "main.js",
            "page.js",
            "runs.js",
            "sampling.js",
            "style.css",
            "tokens.js",
        )
    },
}
_MOST_NEW_TOKENS = 1000


class ModelRequest(Asked):
    """A model by its key, and the page that asks."""

    page: str = Field(max_length=40)
    model: str


class TextRequest(ModelRequest):
    """A text, or its ids without the token that begins a text."""

    text: str | None = None
    ids: list[int] | None = None

    def ids_of(self, opened: OpenModel) -> list[int]:
        """Return the ids of the text. Raises UsageError for ids that the model does not have."""
        if self.text is not None and self.ids is None:
            return opened.encode(self.text)
        if self.ids is not None and self.text is None:
            check_ids(opened.model, self.ids)
            return self.ids
        raise UsageError("give either text or ids")


class Sampling(Asked):
    """How the next token is chosen."""

    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)


class SamplingRequest(TextRequest):
    """A text, and how its next token is chosen."""

    sampling: Sampling


class GenerateRequest(SamplingRequest):
    """A text or conversation to continue."""

    messages: list[Turn] | None = None
    max_new_tokens: int = Field(50, ge=1, le=_MOST_NEW_TOKENS)
    seed: int | None = Field(None, ge=0, lt=2**63)


class AttentionRequest(TextRequest):
    """A head of a layer."""

    layer: int
    head: int


class LensRequest(TextRequest):
    """The last position that is shown."""

    position: int


class CompareRequest(ModelRequest):
    """A text, and the model to compare with."""

    other: str
    text: str


class ChatRequest(ModelRequest):
    """A conversation."""

    messages: list[Turn]


class PlayPage:
    """The answers to the page's requests; `app` is the application."""

    def __init__(self, models: Models) -> None:
        self._models, self.work = models, Work()
        self._runs = {place: RunReader(Path(place)) for place in models.places if holds_run(Path(place))}

    def app(self) -> ASGIApp:
        """Return the application."""
        routes = [Route("/models", self._list)]
        for name, kind, view in (
            ("open", ModelRequest, self._open),
            ("read", TextRequest, self._read),
            ("sampling", SamplingRequest, self._sample),
            ("attention", AttentionRequest, self._attend),
            ("lens", LensRequest, self._look),
            ("compare", CompareRequest, self._compare),
            ("conversation", ChatRequest, self._converse),
        ):
            routes.append(Route(f"/{name}", self._endpoint(name, kind, view), methods=["POST"]))
        routes.append(Route("/curves", self._curves))
        routes.append(Route("/generate", self._generate, methods=["POST"]))
        return pages_app(FILES, routes)

    def _endpoint(self, name: str, kind: type[Any], view: Callable[[OpenModel, Any, Stop], Json]) -> Any:
        async def answer(request: Request) -> Response:
            asked = await read_request(request, kind)

            def compute(stop: Stop) -> Json:
                return view(self._models.open(asked.model), asked, stop)

            try:
                return JSONResponse(await self.work.run(f"{asked.page}/{name}", compute))
            except StoppedError as error:
                raise HTTPException(409, str(error)) from None

        return answer

    async def _list(self, _: Request) -> Response:
        entries = self._models.entries()
        return JSONResponse([{"key": each.key, "label": each.label, "step": each.step} for each in entries])

    async def _curves(self, _: Request) -> Response:
        # In the thread of all work, as a reader keeps its place in the file.
        return JSONResponse(await self.work.run("curves", self._run_views))

    def _run_views(self, _: Stop) -> list[Json]:
        labels = self._models.labels()
        return [_run_view(labels[place], reader) for place, reader in self._runs.items()]

    def _open(self, opened: OpenModel, asked: ModelRequest, stop: Stop) -> Json:
        return opened.facts()

    def _read(self, opened: OpenModel, asked: TextRequest, stop: Stop) -> Json:
        return read_view(opened, asked.ids_of(opened), stop)

    def _sample(self, opened: OpenModel, asked: SamplingRequest, stop: Stop) -> Json:
        return sampling_view(opened, asked.ids_of(opened), **asked.sampling.model_dump())

    def _attend(self, opened: OpenModel, asked: AttentionRequest, stop: Stop) -> Json:
        return attention_view(opened, asked.ids_of(opened), asked.layer, asked.head)

    def _look(self, opened: OpenModel, asked: LensRequest, stop: Stop) -> Json:
        return lens_view(opened, asked.ids_of(opened), asked.position)

    def _compare(self, opened: OpenModel, asked: CompareRequest, stop: Stop) -> Json:
        return compare_view(opened, self._models.open(asked.other), asked.text, stop)

    def _converse(self, opened: OpenModel, asked: ChatRequest, stop: Stop) -> Json:
        return conversation_view(opened, asked.messages)

    async def _generate(self, request: Request) -> Response:
        asked = await read_request(request, GenerateRequest)

        def prompt(stop: Stop) -> tuple[list[int], int]:
            opened = self._models.open(asked.model)
            if asked.messages is not None:
                return prompt_ids(opened, asked.messages), 0
            ids = asked.ids_of(opened)
            return opened.with_start(ids), len(ids)

        line = f"{asked.page}/generate"
        try:
            whole, n_text = await self.work.run(line, prompt)
        except StoppedError as error:
            raise HTTPException(409, str(error)) from None
        return StreamingResponse(self._tokens(asked, whole, n_text, line), media_type="application/x-ndjson")

    async def _tokens(self, asked: GenerateRequest, whole: list[int], n_text: int, line: str) -> AsyncIterator[str]:
        """Yield a line of JSON for each new token, then one with the reason of the end.

        `n_text` counts the ids at the end of `whole` that are shown as text: none of a conversation's prompt.
        """
        generator = torch.Generator().manual_seed(secrets.randbits(63) if asked.seed is None else asked.seed)
        end = "1 token was added" if asked.max_new_tokens == 1 else f"{asked.max_new_tokens} tokens were added"
        try:
            for n_new in range(1, asked.max_new_tokens + 1):
                step = partial(self._next, asked, whole, n_text + n_new, generator)
                event = await self.work.run(line, step)
                if "end" in event:
                    end = event["end"]
                    break
                yield json.dumps(event) + "\n"
        except (GPTKitError, RuntimeError) as error:  # the status is sent already, so an error is a line
            end = one_line(error)
        yield json.dumps({"end": end}) + "\n"

    def _next(
        self, asked: GenerateRequest, whole: list[int], n_text: int, generator: torch.Generator, stop: Stop
    ) -> Json:
        """Add a token to the ids and return it, or return why there is none."""
        opened = self._models.open(asked.model)
        room = opened.reader.context_length
        if room is not None and len(whole) >= room:
            return {"end": f"the model's context of {room} tokens is full"}
        token = choose_next(opened, whole, generator, **asked.sampling.model_dump())
        if token in opened.eos_ids:
            return {"end": f"the model ended the text: it chose {opened.spell(token)}"}
        whole.append(token)
        return added_view(opened, whole, n_text)


def _run_view(name: str, reader: RunReader) -> Json:
    """Return the curves of a run and its best checkpoint; only the error if it cannot be read."""
    shown: Json = {"name": name}
    try:
        run = reader.read()
    except CheckpointError as error:
        return shown | {"error": one_line(error)}
    best = None if run.best is None else {"step": run.best[0], "value": run.best[1]}
    return shown | {"state": run.state, "best": best, "curves": curves(run, {})}


def play(
    places: Sequence[str],
    *,
    device: str = "cpu",
    port: int = 0,
    open_browser: bool = False,
    announce: Callable[[str], None],
) -> None:
    """Serve the page for the models of runs, model folders or Hub repositories until SIGINT or SIGTERM.

    The first model is loaded before the address is announced, others when they are chosen. Raises UsageError for a
    place without a model, and as `serve_page` does.
    """
    models = Models(places, device)
    first = models.first()
    models.open(first.key)
    page = PlayPage(models)
    try:
        serve_page(page.app(), f"{first.label} is open at", port=port, open_browser=open_browser, announce=announce)
    finally:
        page.work.end()
