"""What the HTTP servers of this package share: their packages, the socket, and uvicorn's run until a signal."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation.signals import sigterm_as_interrupt

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_PACKAGES = ("pydantic", "starlette", "uvicorn")  # of each extra that serves


def check_packages(what: str, extra: str) -> None:
    """Raise UsageError if the packages of the extra that `what` needs are missing."""
    if any(find_spec(package) is None for package in _PACKAGES):
        raise UsageError(f"{what} needs packages that are not installed: pip install 'gpt-kit-hf[{extra}]'")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one. Raises UsageError for an address that cannot be used."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port={port}: from 0, which selects a free port, to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(f"host={host!r} and port={port} cannot be listened to: {error.strerror}") from None


def run_until_signal(
    app: ASGIApp, listener: socket.socket, *, seconds: float, stop_jobs: Callable[[], None] = lambda: None
) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Answers that are on their way then have `seconds`; `stop_jobs` is called after these, and after as many again their
    tasks are cancelled.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(seconds, stop_jobs)
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=max(1, round(2 * seconds)))
    # uvicorn stops at either signal, and raises it again when it has stopped.
    with suppress(KeyboardInterrupt), sigterm_as_interrupt():
        Server(config).run(sockets=[listener])
