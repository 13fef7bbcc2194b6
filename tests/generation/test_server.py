"""The server as clients meet it: once as a process of its own over loopback, else through its app."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from tiny_model import CHAT_TEMPLATE, CONTEXT, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gpt_kit_hf.commands.main import main
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation import server
from gpt_kit_hf.generation.server import serve

N_NEW = 16


@pytest.fixture(autouse=True, scope="module")
def _own_verbosity() -> Iterator[None]:
    """Put back what the server changes for its whole process: other tests look at what transformers logs."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "completion"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    write_tiny_model(folder, chat_template=CHAT_TEMPLATE)
    return folder


def generated(folder: Path, prompt: str, n_new: int = N_NEW) -> str:
    """What transformers' own generate says, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False)
    text = str(AutoTokenizer.from_pretrained(folder).decode(out[0, ids.shape[1] :]))
    assert len(set(text)) > 2  # or a wrong prompt might not show
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- over loopback ---------------------------------------------------------------------------------------


def test_a_chat_request_over_loopback_is_answered_and_streamed(folder: Path) -> None:
    before = contents(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_kit_hf.commands.main", "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    too_long = threading.Timer(180, process.kill)
    too_long.start()
    try:
        assert process.stdout is not None
        line, note = process.stdout.readline(), process.stdout.readline()
        address = re.match(rf"{re.escape(str(folder))} is served at (http://127\.0\.0\.1:\d+/v1) .* Try: curl ", line)
        assert address is not None, (line, process.communicate())
        assert "it is a completion model" in note
        check_with_openais_client(address[1], folder)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        too_long.cancel()
        process.kill()
        process.wait()
    assert contents(folder) == before


def check_with_openais_client(url: str, folder: Path) -> None:
    # No proxy of the environment: it would not know this machine's loopback.
    client = openai.OpenAI(base_url=url, api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False))
    asked: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": "the quick"}],
        "max_tokens": N_NEW,
        "temperature": 0,
    }
    expected = generated(folder, "the quick")
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    chunks = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)]
    pieces = [piece for piece in chunks if piece]
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    completion = client.completions.create(model=asked["model"], prompt="fox", max_tokens=N_NEW, temperature=0)
    assert completion.choices[0].text == generated(folder, "fox")
    client.close()


# --- through the app -------------------------------------------------------------------------------------


class Served:
    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = server._load(str(folder), str(folder))
        self.has_template = self.tokenizer.chat_template is not None
        self.app = server._make_app(str(folder), self.model, self.tokenizer)

    def post(self, path: str, **body: Any) -> Any:
        async def send() -> Any:
            transport = httpx2.ASGITransport(app=self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://here/v1") as client:
                return await (client.post(path, json=body) if body else client.get(path))

        return asyncio.run(send())

    def answer(self, *texts: str, **body: Any) -> str:
        """The answer to messages of user and assistant in turn."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        answer = self.post("/chat/completions", messages=messages, max_tokens=N_NEW, **body).json()
        return str(answer["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    return Served(folder)


@pytest.fixture(scope="module")
def chat_served(chat_folder: Path) -> Served:
    return Served(chat_folder)


def test_a_model_without_a_template_continues_the_messages_as_one_text(served: Served, folder: Path) -> None:
    assert not served.has_template
    assert served.answer("the quick", " brown", "fox", temperature=0) == generated(folder, "the quick brown\nfox")


def test_a_models_own_template_is_used(chat_served: Served, chat_folder: Path) -> None:
    assert chat_served.has_template
    assert chat_served.answer("fox", temperature=0) == generated(chat_folder, "[u]fox[a]")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_where_the_context_does(stream: bool, served: Served, folder: Path) -> None:
    answer = served.post("/completions", prompt="x" * 50, temperature=0, stream=stream)
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == generated(folder, "x" * 50, CONTEXT - 50)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["total_tokens"] == CONTEXT


def test_an_invalid_request_is_answered_with_the_reason(served: Served) -> None:
    for body, message in (
        ({"prompt": "x" * CONTEXT}, "the prompt has 64 tokens; the model's context of 64 leaves no room"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
    ):
        answer = served.post("/completions", **body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    streamed = served.post("/completions", prompt="x" * CONTEXT, stream=True)
    assert "leaves no room" in json.loads(streamed.text.removeprefix("data: "))["error"]


def test_an_error_of_the_chat_template_is_the_response(chat_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_served.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    answer = chat_served.post("/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "roles must alternate")


def test_requests_sample_unless_they_say_otherwise(served: Served) -> None:
    seeds = [{"seed": seed} for seed in range(4)]
    assert len({served.answer("the quick", **seed) for seed in seeds}) > 1
    assert len({served.answer("the quick", temperature=0.9, **seed) for seed in seeds}) > 1
    assert len({served.answer("the quick", temperature=0, **seed) for seed in seeds}) == 1


def test_a_generation_config_that_sets_do_sample_is_obeyed(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.do_sample = False
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    greedy = Served(tmp_path)
    assert len({greedy.answer("the quick", seed=seed) for seed in range(4)}) == 1


def test_the_server_serves_one_model_only(served: Served, folder: Path) -> None:
    assert [model["id"] for model in served.post("/models").json()["data"]] == [str(folder)]
    assert "pinned" in served.post("/completions", prompt="x", model="someone/else").json()["detail"]
    for path in ("http://here/reset", "http://here/load_model"):
        assert served.post(path, model="someone/else").status_code == 404
    assert served.post("http://here/health").json() == {"status": "ok"}


def test_a_folder_name_may_contain_an_at_sign(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "run@2"
    link.symlink_to(folder)
    answer = Served(link).post("/completions", prompt="fox", max_tokens=N_NEW, temperature=0, model=str(link))
    assert answer.json()["choices"][0]["text"] == generated(folder, "fox")


def test_a_response_carries_the_id_of_its_request(served: Served) -> None:
    answer = served.post("/responses", input="fox", max_output_tokens=N_NEW, temperature=0, stream=False)
    assert answer.status_code == 200
    assert answer.json()["id"] == f"resp_{answer.headers['x-request-id']}"


# --- before it serves ------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_served_is_a_one_line_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(place: Path, port: int = 0, host: str = "127.0.0.1") -> str:
        assert main(["serve", str(place), f"--host={host}", f"--port={port}"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "holds no model" in refused(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port={port} cannot be listened to: Address already in use" in refused(folder, port)
    assert "host='no such host' and port=0 cannot be listened to" in refused(folder, host="no such host")
    assert "port must be at least 0 and at most 65535, got 65536" in refused(folder, 65536)
    with pytest.raises(UsageError, match="port=65536: from 0"):
        serve(str(folder), port=65536, announce=lambda _: None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "cannot be loaded" in refused(tmp_path / "empty")
    monkeypatch.setattr(server, "is_serve_available", lambda: False)
    assert "pip install 'gpt-kit-hf[serve]'" in refused(folder)


def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, content in contents(folder).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tokenizer_fingerprint": "0" * 16}))
    with pytest.raises(UsageError, match="fingerprint"):
        serve(str(tmp_path), port=0, announce=lambda _: None)
