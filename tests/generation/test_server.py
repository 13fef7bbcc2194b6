"""The command `serve`: it starts, stops and refuses. `test_openai_server.py` asks a running server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from tiny_model import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gpt_kit_hf.commands.main import main
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.generation import http_server
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


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI, list[str]]]:
    """The command as a process of its own, a client for it, and the lines that it printed."""
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    too_long = threading.Timer(180, process.kill)
    too_long.start()
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        address = re.match(
            rf"{re.escape(str(folder))} is served at (http://127\.0\.0\.1:\d+/v1) .* Try: curl ", lines[0]
        )
        assert address is not None, (lines, process.communicate())
        # No proxy of the environment: it would not know this machine's loopback.
        transport = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(base_url=address[1], api_key="none", max_retries=0, http_client=transport) as client:
            yield process, client, lines
    finally:
        too_long.cancel()
        process.kill()
        process.communicate()


def test_the_command_serves_until_interrupted(folder: Path) -> None:
    before = contents(folder)
    with started(folder) as (process, client, lines):
        assert "chat requests are refused" in lines[1]
        name = client.models.list().data[0].id
        completion = client.completions.create(model=name, prompt="fox", max_tokens=N_NEW, temperature=0)
        assert completion.choices[0].text == generated(folder, "fox")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert "Loading weights" not in errors  # no progress bar
    assert contents(folder) == before


def test_the_command_stops_at_sigterm_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, context=500_000)
    config = tmp_path / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "repetition_penalty": 1.2}))
    with started(tmp_path) as (process, client, _):
        assert process.stdout is not None
        assert "does not apply repetition_penalty of generation_config.json" in process.stdout.readline()
        name = client.models.list().data[0].id
        stream = client.completions.create(model=name, prompt="fox", temperature=0, stream=True)
        chunks = iter(stream)
        assert next(chunks).choices[0].text
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server has been stopped"):
            list(chunks)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        assert time.monotonic() - begun < 30


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
    monkeypatch.setattr(http_server, "_PACKAGES", ("no_such_package",))
    assert "pip install 'gpt-kit-hf[serve]'" in refused(folder)


def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, content in contents(folder).items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tokenizer_fingerprint": "0" * 16}))
    with pytest.raises(UsageError, match="fingerprint"):
        serve(str(tmp_path), port=0, announce=lambda _: None)
