"""A server for pages of this package on this machine.

What keeps others out, as the pages have no password:

- It listens on 127.0.0.1 only. A request whose Host header names another host is refused: a web page whose name was
  pointed to this machine (DNS rebinding) cannot ask.
- A request that another web page makes is refused by its Origin header, and no answer has a header that would let
  another page read it. Bodies must be JSON, which a form of another page cannot send.
- Files come from a list that is read when the server starts. No part of a request becomes a path.
- The Content-Security-Policy allows scripts and styles from this server's own files only: text that looks like HTML
  cannot run, even where a page would insert it by mistake.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_kit_hf.errors import GPTKitError, one_line
from gpt_kit_hf.generation.http_server import listen, run_until_signal

STATIC_FOLDER = Path(__file__).parent / "static"

_HOST = "127.0.0.1"
_NAMES = [_HOST, "localhost"]
_BODY_BYTES = 2**20  # the most of a request
_SHUTDOWN_SECONDS = 1
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_Asked = TypeVar("_Asked", bound="Asked")


class Asked(BaseModel):
    """The base of a request's body: an object without unknown fields, whose numbers are no texts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def pages_app(files: Mapping[str, str], routes: Iterable[BaseRoute]) -> ASGIApp:
    """Return an application.

    Args:
        files: {address: name of a file in `static/`}, such as {"/": "play.html", "/play.js": "play.js"}.
        routes: what else is answered. An endpoint that is no coroutine runs in a thread. A GPTKitError that it raises
            is answered by status 400 and {"error": message}.

    """
    app = Starlette(
        routes=[*(_file_route(address, name) for address, name in files.items()), *routes],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES, www_redirect=False),
            Middleware(_OwnOrigin),
        ],
        exception_handlers={GPTKitError: _refuse, HTTPException: _refuse_request, Exception: _fail},
    )
    return _SafeHeaders(app)  # around all of it, so that the answer to an error has them, too


def _file_route(address: str, name: str) -> Route:
    content, media_type = (STATIC_FOLDER / name).read_bytes(), _MEDIA_TYPES[Path(name).suffix]

    async def answer(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route(address, answer)


async def read_request(request: Request, kind: type[_Asked]) -> _Asked:
    """Return the JSON body of a request. Raises HTTPException for another type, a large body and wrong fields."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _BODY_BYTES:
            raise HTTPException(413, f"the body has more than {_BODY_BYTES} bytes")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise HTTPException(400, f"{place}: {first['msg']}") from None


def serve_page(
    app: ASGIApp, title: str, *, port: int = 0, open_browser: bool = False, announce: Callable[[str], None]
) -> None:
    """Serve an application on 127.0.0.1 until SIGINT or SIGTERM.

    `announce` receives one line with the address. Port 0 takes a free one. `open_browser` opens the page, where there
    is a terminal and a screen. Raises UsageError if the port cannot be used.
    """
    with listen(_HOST, port) as listener:
        url = f"http://{_HOST}:{listener.getsockname()[1]}/"
        announce(f"{title}: {url} (Ctrl-C stops)")
        if open_browser and sys.stdout.isatty() and _has_screen():
            webbrowser.open(url)
        run_until_signal(app, listener, seconds=_SHUTDOWN_SECONDS)


def _has_screen() -> bool:
    """Return whether a window can be opened; without one, a browser of the terminal would take the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


class _SafeHeaders:
    """Middleware that adds `_HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _OwnOrigin:
    """Middleware that refuses what the page of another origin asks."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers.get('host')}":
            refusal = JSONResponse({"error": "pages of other origins are refused"}, status_code=403)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def _refuse(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": one_line(error)}, status_code=400)


async def _refuse_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _fail(_: Request, error: Exception) -> Response:
    content: dict[str, Any] = {"error": f"the server failed: {type(error).__name__}; its log has the details"}
    return JSONResponse(content, status_code=500)
