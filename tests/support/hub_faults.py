"""Connections to the loopback Hub, and the faults that a test can inject into them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Literal, get_args
from urllib.parse import parse_qs, urlsplit

Kind = Literal["status", "drop", "cut_upload", "lose_answer", "truncate", "reset", "flip", "delay"]
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")


@dataclass(frozen=True)
class Fault:
    """A fault of the requests of a method whose target matches `path`, a regular expression.

    The first `skip` of them are answered well, the next `times` fail, and the rest are answered well.

    - status: answered by this status; nothing else is done.
    - drop: the connection ends after the request was read; nothing was done, nothing is answered.
    - cut_upload: the connection is reset when half of the request's body was read; nothing was done.
    - lose_answer: what was asked for is done, and the connection ends before the answer.
    - truncate: the answer's headers are right, half of its body is sent, and the connection ends.
    - reset: the same, but the connection ends by a reset, which the client sees as another error.
    - flip: one bit in the middle of the answer's body is wrong.
    - delay: everything is right, after this many seconds.
    """

    method: str
    path: str
    kind: Kind
    status: int = 503
    times: int = 1
    skip: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.method not in _METHODS or self.times < 1 or self.skip < 0:
            raise ValueError(f"no such fault: {self}")
        if self.method == "HEAD" and self.kind in ("truncate", "reset", "flip"):
            raise ValueError(f"the answer to HEAD has no body that could suffer: {self}")
        if (self.kind == "delay") != (self.seconds > 0):
            raise ValueError(f"a delay needs seconds, and nothing else has them: {self}")
        re.compile(self.path)


@dataclass
class Armed:
    """An injected fault with the numbers of matching requests and of failures."""

    fault: Fault
    seen: int = 0
    fired: int = 0


class Faults:
    """The injected faults; the first one due is applied to a request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[Armed] = []

    def add(self, fault: Fault) -> Armed:
        armed = Armed(fault)
        with self._lock:
            self._armed.append(armed)
        return armed

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    def claim(self, method: str, target: str) -> Fault | None:
        due = None
        with self._lock:
            for armed in self._armed:
                fault = armed.fault
                if fault.method != method or not re.search(fault.path, target):
                    continue
                armed.seen += 1
                if due is None and armed.seen > fault.skip and armed.fired < fault.times:
                    armed.fired += 1
                    due = fault
        return due


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # as sent: quoted, with its query
    headers: Message
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}


@dataclass(frozen=True)
class Answer:
    status: HTTPStatus
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def answer_json(value: object, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class Logged:
    """One logged request; status 0 means that it was not answered."""

    method: str
    path: str  # as sent: quoted, with its query
    status: int
    had_authorization: bool


class Connection(BaseHTTPRequestHandler):
    """Reads requests, answers them, and applies the fault that is due."""

    server: Listener
    protocol_version = "HTTP/1.1"  # the client keeps connections, and a cut one must look like what it is
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        fault = self.server.faults.claim(self.command, self.path)
        kind = fault.kind if fault else None
        assert "Transfer-Encoding" not in self.headers, "the loopback Hub reads bodies of a known length only"
        length = int(self.headers.get("Content-Length", 0))
        if kind == "cut_upload":
            self.rfile.read(length // 2)
            self._log(0)
            self._reset()
            return
        request = Request(self.command, self.path, self.headers, self.rfile.read(length))
        if len(request.body) < length:
            self._log(0)
            self.close_connection = True  # the client left in the middle
            return
        if fault and kind == "delay":
            self.server.stopping.wait(fault.seconds)
        if kind == "drop":
            self._lose()
        elif fault and kind == "status":
            self._send(Answer(HTTPStatus(fault.status), b'{"error": "a fault that the test asked for"}'), None)
        else:
            answer = self.server.answer(request)
            if kind == "lose_answer":
                self._lose()
            else:
                self._send(answer, kind)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 (the base class names them)

    def _log(self, status: int) -> None:
        self.server.requests.append(Logged(self.command, self.path, status, "Authorization" in self.headers))

    def _lose(self) -> None:
        self._log(0)
        self.close_connection = True

    def _reset(self) -> None:
        self.close_connection = True
        # Without lingering, closing sends a reset; the handler's own way would say goodbye first.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _send(self, answer: Answer, kind: Kind | None) -> None:
        body = answer.body
        assert body or kind not in ("truncate", "reset", "flip"), f"{kind}: no body to {self.command} {self.path}"
        if kind == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self._log(answer.status)  # before it is sent: who has the answer finds it in the log
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind in ("truncate", "reset"):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            if kind == "reset":
                self._reset()
        else:
            self.wfile.write(body)


class Listener(HTTPServer):
    """Serves on a free local port, one thread a connection; all threads have ended when stop() returns."""

    def __init__(self, respond: Callable[[Request], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.faults = Faults()
        self.requests: list[Logged] = []
        self.crashes: list[str] = []
        self.stopping = threading.Event()
        self._respond = respond
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def answer(self, request: Request) -> Answer:
        """What the Hub answers; a defect of the Hub itself is kept, to fail the test that found it."""
        try:
            return self._respond(request)
        except Exception:
            self.crashes.append(traceback.format_exc())
            return Answer(HTTPStatus.INTERNAL_SERVER_ERROR)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._converse, args=(request, client_address), daemon=True)
        self._connections[thread] = request
        thread.start()

    def _converse(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except ConnectionError:
            pass  # clients may leave when they like
        except Exception:
            self.crashes.append(traceback.format_exc())
        finally:
            self.shutdown_request(request)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
        for thread, connection in self._connections.items():
            with contextlib.suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=10)
            assert not thread.is_alive(), "a connection of the loopback Hub did not end"
