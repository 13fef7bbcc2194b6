"""Work for a request in a thread, with its results in the event loop, and its end where the client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeAlias
from weakref import WeakSet

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_kit_hf.generation.completion import Chunk
from gpt_kit_hf.generation.openai_api.answers import Answer
from gpt_kit_hf.generation.openai_api.protocol import ApiError

_log = logging.getLogger(__name__)


# What a thread does for a request, with the functions `on_chunk` and `is_cancelled`.
Work: TypeAlias = Callable[[Callable[[Chunk], None], Callable[[], bool]], None]


class Jobs:
    """The threads that work on requests; requests beyond `at_once` wait for their turn."""

    def __init__(self, at_once: int) -> None:
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="generation")
        self._running: WeakSet[Job] = WeakSet()

    def start(self, work: Work) -> Job:
        """Return a new job."""
        job = Job(work)
        self._running.add(job)
        self._pool.submit(job.run)
        return job

    def stop(self) -> None:
        """End all jobs; their clients are told that the server stops."""
        for job in self._running:
            job.cancel(ApiError("the server has been stopped", status=503))


class Job:
    """The work for one request."""

    def __init__(self, work: Work) -> None:
        self._work, self._cancelled = work, threading.Event()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | ApiError | None] = asyncio.Queue()
        self._end: ApiError | None = None

    def cancel(self, reason: ApiError | None = None) -> None:
        """Let the thread stop before its next token; `reason` is raised where the chunks are read."""
        self._end = reason
        self._cancelled.set()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield the chunks. Raises ApiError if the work failed or was cancelled for a reason."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item

    def run(self) -> None:
        """Do the work, in a thread."""
        try:
            if not self._cancelled.is_set():
                self._work(self._put, self._cancelled.is_set)
            self._put(self._end)
        except BaseException as error:  # of any kind: the client waits for an answer
            _log.error("a request failed", exc_info=error)
            self._put(internal_error(error))

    def _put(self, item: Chunk | ApiError | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


async def collect(request: Request, job: Job, answer: Answer) -> bool:
    """Add all chunks to the answer; return False if the client disconnected, which cancels the job."""

    async def add_all() -> None:
        async for chunk in job.chunks():
            answer.add(chunk)

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(add_all()), asyncio.create_task(disconnect())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] in done:
            await tasks[0]
        return tasks[0] in done
    finally:
        job.cancel()
        for task in tasks:
            task.cancel()


class EventStream(StreamingResponse):
    """The answer as server-sent events; whatever ends the response, a client that disconnects too, ends the job."""

    def __init__(self, job: Job, answer: Answer) -> None:
        self._job, self._answer = job, answer
        super().__init__(self._lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()

    async def _lines(self) -> AsyncIterator[str]:
        answer = self._answer
        try:
            for event in answer.opening():
                yield _line(event)
            async for chunk in self._job.chunks():
                answer.add(chunk)
                for event in answer.events(chunk):
                    yield _line(event)
            for event in answer.closing():
                yield _line(event)
        except ApiError as error:  # the status is sent already, so an error is an event
            yield _line(error.body())
        yield "data: [DONE]\n\n"


class RequestId:
    """Middleware that gives each response the header `x-request-id`: that of its request, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        given = Headers(scope=scope).get("x-request-id") if scope["type"] == "http" else None

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = given or str(uuid.uuid4())
            await send(message)

        await self._app(scope, receive, send_with_id)


def internal_error(error: BaseException) -> ApiError:
    """Return what a client is told of an error of the server itself."""
    return ApiError(f"the server failed: {type(error).__name__}; its log has the details", status=500)


def _line(event: dict[str, Any]) -> str:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n"
