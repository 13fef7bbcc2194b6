"""Pushing to the Hub on this machine's loopback: the client's fixtures, and pushes without fresh processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi

from gpt_kit_hf.hub import probe as published_probe

REPO = "ann/tiny"
SECRET = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
# A program that knows transformers alone: it writes logits and ids. Code of the repository is run if there is a third
# argument.
LOADER = """
import sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gpt_kit_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
runs_code = len(sys.argv) > 3
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=runs_code).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=runs_code)
ids = torch.tensor([tokenizer("Now is the winter")["input_ids"]])
assert "gpt_kit_hf" not in sys.modules
save_file({"logits": model(ids).logits.detach(), "ids": ids}, sys.argv[2])
"""
_LOADING = threading.Lock()  # transformers loads one model at a time in a process


@pytest.fixture
def api(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    # transformers lists chat templates by a client that it keeps.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    return HfApi(endpoint=hub.url, token=hub.token)


def in_process(
    requests: list[dict[str, Any]], work: Path, with_package: bool, api: HfApi | None = None
) -> list[dict[str, Any]]:
    """The probe without a process of its own: quick, but no substitute for post-push verification."""
    with _LOADING:
        answers = [published_probe.probe(request, with_package=True) for request in requests]
    for answer in answers:
        if not with_package and answer.get("model", {}).get("class", "").startswith("GPTKit"):
            answer["model"]["module"] = "transformers_modules.here"
    return answers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushes without fresh processes, for tests of anything but the verification."""
    monkeypatch.setattr("gpt_kit_hf.hub.push.run_probe", in_process)
    monkeypatch.setattr("gpt_kit_hf.hub.verify.run_probe", in_process)
