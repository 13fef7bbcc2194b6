"""A model served over loopback by a thread of the test's own process, with OpenAI's client for it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvicorn

from gpt_kit_hf.generation.engine import CompletionEngine
from gpt_kit_hf.generation.openai_api.app import Defaults, OpenAIServer
from gpt_kit_hf.generation.server import load


@dataclass
class Served:
    """A running server, its model, of any engine, and a client."""

    name: str
    model: Any
    port: int
    client: openai.OpenAI

    def send(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Send a request as it stands, GET without a body; return status, JSON and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET" if body is None else "POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()

    def error(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the error with which a request is refused, in OpenAI's form."""
        status, answer, _ = self.send(path, json.dumps(body).encode())
        assert status in (400, 404), answer
        assert set(answer) == {"error"}
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert "\n" not in error["message"]
        return dict(error)


@contextmanager
def serving(folder: Path, cors_allow_origins: Sequence[str] = ()) -> Iterator[Served]:
    """Serve the model of a folder until the block ends."""
    model, config = load(str(folder), str(folder))
    with serving_engine(str(folder), model, Defaults.of(config), cors_allow_origins) as served:
        yield served


@contextmanager
def serving_engine(
    name: str, model: CompletionEngine, defaults: Defaults, cors_allow_origins: Sequence[str] = ()
) -> Iterator[Served]:
    """Serve a model of any engine until the block ends."""
    app = OpenAIServer(name, model, defaults).app(cors_allow_origins)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        # No proxy of the environment: it would not know this machine's loopback.
        transport = openai.DefaultHttpxClient(trust_env=False)
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            url = f"http://127.0.0.1:{port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=transport) as client:
                yield Served(name, model, port, client)
        finally:
            server.should_exit = True
            thread.join()
