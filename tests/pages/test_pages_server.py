"""The server of the pages: who may ask, what is answered, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.pages import server
from gpt_kit_hf.pages.server import Asked, pages_app, read_request, serve_page


class Sum(Asked):
    a: int
    b: int


async def add(request: Request) -> Response:
    asked = await read_request(request, Sum)
    if asked.a < 0:
        raise UsageError(f"a={asked.a}: 0\nor more")
    return JSONResponse({"sum": asked.a + asked.b})


def fail(_: Request) -> Response:
    raise RuntimeError("/a/private/path")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    static = tmp_path_factory.mktemp("static")
    (static / "page.html").write_text("<p>page</p>")
    (static / "page.js").write_text("1")
    (static / "unlisted.js").write_text("2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "STATIC_FOLDER", static)
        app = pages_app(
            {"/": "page.html", "/page.js": "page.js"}, [Route("/add", add, methods=["POST"]), Route("/fail", fail)]
        )
    return TestClient(app, base_url="http://127.0.0.1:8123", raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body: Invalid JSON: EOF while parsing"),
        (b'"a": 1', "the body: Invalid JSON: trailing characters"),
        (b"[1, 2]", "the body: Input should be an object"),
        (b'{"a": 1}', "b: Field required"),
        (b'{"a": "1", "b": 2}', "a: Input should be a valid integer"),
    ],
)
def test_the_message_on_a_wrong_body_begins_with_its_place(client: TestClient, body: bytes, message: str) -> None:
    answer = client.post("/add", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(message)


def test_listed_files_are_served_and_no_other(client: TestClient) -> None:
    page, script = client.get("/"), client.get("/page.js")
    assert (page.text, page.headers["content-type"]) == ("<p>page</p>", "text/html; charset=utf-8")
    assert (script.text, script.headers["content-type"]) == ("1", "text/javascript; charset=utf-8")
    for path in (
        "/unlisted.js",
        "/page.html",
        "/../conftest.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/static/",
    ):
        assert client.get(path).status_code == 404, path


def test_every_answer_forbids_foreign_scripts(client: TestClient) -> None:
    for answer in (client.get("/"), client.get("/none"), client.get("/fail"), client.get("/", headers={"host": "x"})):
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8123", "127.0.0.1.evil.example", "0.0.0.0:8123", ""])
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 400
    assert client.post("/add", json={"a": 1, "b": 2}, headers={"host": host}).status_code == 400


def test_names_of_this_machine_are_served(client: TestClient) -> None:
    for host in ("127.0.0.1:8123", "localhost:9", "LOCALHOST"):
        assert client.get("/", headers={"host": host}).status_code == 200


def test_another_origin_is_refused(client: TestClient) -> None:
    def ask(origin: str) -> int:
        return client.post("/add", json={"a": 1, "b": 2}, headers={"origin": origin}).status_code

    assert ask("http://127.0.0.1:8123") == 200
    for origin in ("http://127.0.0.1:8124", "https://127.0.0.1:8123", "http://evil.example", "null"):
        assert ask(origin) == 403, origin


def test_bodies_are_checked(client: TestClient) -> None:
    assert client.post("/add", json={"a": 1, "b": 2}).json() == {"sum": 3}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.post("/add", content=b'{"a": 1, "b": 2}', headers={"content-type": kind})
        assert answer.status_code == 415, kind
    for body, message in (({"a": 1}, "b: "), ({"a": "1", "b": 2}, "a: "), ({"a": 1, "b": 2, "c": 3}, "c: ")):
        answer = client.post("/add", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(message)
    assert client.post("/add", content=b"x" * 2**21, headers={"content-type": "application/json"}).status_code == 413
    assert client.get("/add").status_code == 405


def test_errors_are_one_line_without_private_details(client: TestClient) -> None:
    refused = client.post("/add", json={"a": -1, "b": 2})
    assert (refused.status_code, refused.json()) == (400, {"error": "a=-1: 0 or more"})
    failed = client.get("/fail")
    assert failed.status_code == 500
    assert "RuntimeError" in failed.text
    assert "private" not in failed.text


_PROGRAM = """
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from gpt_kit_hf.pages.server import pages_app, serve_page
import asyncio
async def forever(_):
    async def parts():
        while True:
            yield b"more"
            await asyncio.sleep(0.05)
    return StreamingResponse(parts())
app = pages_app({}, [Route("/", lambda _: PlainTextResponse("here")), Route("/forever", forever)])
serve_page(app, "A page", open_browser=True, announce=lambda line: print(line, flush=True))
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_listens_on_loopback_only_and_stops_at_a_signal(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True)
    too_long = threading.Timer(60, process.kill)
    too_long.start()
    try:
        assert process.stdout is not None
        title, url = process.stdout.readline().removesuffix(" (Ctrl-C stops)\n").split(": ", 1)
        assert title == "A page"
        port = int(url.removeprefix("http://127.0.0.1:").removesuffix("/"))
        assert listening(port) == {"0100007F"}  # 127.0.0.1, as /proc writes it
        with socket.create_connection(("127.0.0.1", port)) as one:
            one.sendall(b"GET /forever HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert one.recv(1000).startswith(b"HTTP/1.1 200")
            process.send_signal(number)  # in the middle of an answer that has no end
            assert process.stdout.readline() == "ended\n"
            assert process.wait() == 0
    finally:
        too_long.cancel()
        process.kill()
        process.communicate()


def listening(port: int) -> set[str]:
    """The addresses on which this machine listens at a port, of IPv4 and IPv6."""
    if not Path("/proc/net/tcp").exists():
        pytest.skip("needs /proc/net")
    rows = [row.split() for file in ("tcp", "tcp6") for row in Path("/proc/net", file).read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


def test_a_port_in_use_is_a_usage_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"port={port} cannot be listened to"):
            serve_page(pages_app({}, []), "x", port=port, announce=lambda _: None)


def test_the_browser_is_opened_on_a_screen_only(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(server, "run_until_signal", lambda *_, **__: None)
    for screen, terminal, expected in ((True, True, 1), (False, True, 0), (True, False, 0)):
        opened.clear()
        monkeypatch.setattr(server, "_has_screen", lambda screen=screen: screen)
        monkeypatch.setattr(server.sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        lines: list[str] = []
        serve_page(pages_app({}, []), "x", open_browser=True, announce=lines.append)
        assert len(opened) == expected
        assert all(url in lines[0] for url in opened)
