"""A browser for the tests of pages, and pages served from this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from browser import Browser, browser, find_chromium
from starlette.types import ASGIApp

from gpt_kit_hf.generation.http_server import listen


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests of this process."""
    if find_chromium() is None:
        pytest.skip("needs a browser: install chromium, chromium-browser or google-chrome")
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[ASGIApp], str]]:
    """Serve an application on a free port of this machine until the tests of the module end; returns its address."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(serving(app))


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
