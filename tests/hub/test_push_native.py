"""`gpt-kit push --native`: a model of transformers' own class over loopback, verified without remote code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pushing
import pytest
import torch
from hand_written_models import tiny_gpt_kit
from hub_server import HubServer
from huggingface_hub import HfApi
from pushing import LOADER, REPO, SECRET
from safetensors.torch import load_file
from shapes import MODERN
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import (
    CheckpointError,
    PushOptions,
    UsageError,
    get_chat_template,
    get_encoding,
    pull_model,
    push_to_hub,
    verify_publication,
    write_card,
)
from gpt_kit_hf.hub.manifest import REMOTE_CODE
from gpt_kit_hf.hub.model_folder import write_model_folder

pytestmark = hub_server.CLIENT_WARNINGS
hub = hub_server.hub
api = pushing.api
quick = pushing.quick
ROOT = Path(__file__).resolve().parents[2]
NATIVE = PushOptions(native=True, keep_card="run")
BACK = PushOptions(keep_card="run")


FORMS = {
    "GPT2LMHeadModel": {},
    "Qwen3ForCausalLM": {**MODERN, "n_embd": 24, "n_head": 2},
    "LlamaForCausalLM": {**MODERN, "n_embd": 24, "n_head": 2, "qk_norm": False},
}


@pytest.fixture
def form(request: pytest.FixtureRequest) -> str:
    """The class of the native form; a test chooses others by a parameter."""
    return str(getattr(request, "param", "GPT2LMHeadModel"))


@pytest.fixture
def model_folder(form: str, tmp_path: Path) -> Path:
    """A model folder over bytes, with a chat template and a card with text of a person."""
    folder = tmp_path / "tiny"
    model = tiny_gpt_kit(vocab_size=257, max_position_embeddings=64, tokenizer_fingerprint=None, **FORMS[form])
    write_model_folder(folder, model, get_encoding("bytes"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = get_chat_template("default")
    tokenizer.save_pretrained(folder)
    card = write_card(folder).path
    card.write_text(f"{card.read_text()}\nWritten by hand.\n")
    return folder


@pytest.mark.slow
def test_what_is_pushed_loads_by_transformers_alone(model_folder: Path, hub: HubServer, tmp_path: Path) -> None:
    """The command, its verification in two fresh processes included; then a third one that only knows transformers."""
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def ended(*command: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *map(str, command)]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    pushed = ended("-m", "gpt_kit_hf.commands.main", "push", model_folder, REPO, "--native")
    assert pushed.returncode == 0, pushed.stderr
    assert "with the package and without, as GPT2LMHeadModel without remote code" in pushed.stdout
    loaded = ended("-c", LOADER, REPO, tmp_path / "logits.safetensors")
    assert loaded.returncode == 0, loaded.stderr
    found = load_file(tmp_path / "logits.safetensors")
    ours = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert torch.equal(found["ids"], torch.tensor([[*b"Now is the winter"]]))
    torch.testing.assert_close(found["logits"], ours(found["ids"]).logits.detach(), rtol=0, atol=1e-5)
    verified = ended("-m", "gpt_kit_hf.commands.main", "push", "--verify_only", REPO)
    assert verified.returncode == 0, verified.stderr
    assert "as GPT2LMHeadModel without remote code" in verified.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_commit_holds_no_code_and_its_card_says_so(
    form: str, model_folder: Path, hub: HubServer, api: HfApi
) -> None:
    result = push_to_hub(model_folder, REPO, NATIVE, api=api)
    files = hub.files(REPO, "main")
    assert set(result.sent) == files.keys() - {".gitattributes"}
    assert not [name for name in files if name.endswith(".py")]
    config = json.loads(files["config.json"])
    assert config["architectures"] == [form]
    assert "auto_map" not in config
    card = files["README.md"].decode()
    assert f"It is a `{form}` of transformers: the repository holds no code" in card
    assert f"vllm serve {REPO}" in card
    assert "trust_remote_code" not in card
    assert "Written by hand." in card


@pytest.mark.usefixtures("quick")
def test_a_repository_changes_its_form_in_one_commit(model_folder: Path, hub: HubServer, api: HfApi) -> None:
    push_to_hub(model_folder, REPO, api=api)
    lines: list[str] = []
    native = push_to_hub(model_folder, REPO, NATIVE, api=api, log=lines.append)
    assert set(native.removed) == set(REMOTE_CODE)
    assert any(line.startswith("removing files of an earlier model: ") for line in lines)
    assert not [name for name in hub.files(REPO, "main") if name.endswith(".py")]
    verify_publication(REPO, api=api).require()
    assert push_to_hub(model_folder, REPO, NATIVE, api=api).sent == {}
    back = push_to_hub(model_folder, REPO, BACK, api=api)
    assert set(REMOTE_CODE) <= set(back.sent)
    assert len(hub.commits(REPO)) == 4  # the one that makes the repository, and one for each change
    verify_publication(REPO, api=api).require()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_native_model_is_pulled_and_pushed_again(
    form: str, model_folder: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    push_to_hub(model_folder, REPO, NATIVE, api=api)
    pulled = pull_model(REPO, tmp_path / "pulled", api=api)
    assert type(AutoModelForCausalLM.from_pretrained(pulled)).__name__ == form
    weights = hub.files(REPO)["model.safetensors"]
    assert (pulled / "model.safetensors").read_bytes() == weights
    for options in (NATIVE, BACK):  # it has one form only
        push_to_hub(pulled, "ann/again", options, api=api)
        assert hub.files("ann/again")["model.safetensors"] == weights
        assert not [name for name in hub.files("ann/again") if name.endswith(".py")]


@pytest.mark.usefixtures("quick")
def test_what_has_no_native_form_changes_nothing(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    model = tiny_gpt_kit(vocab_size=257, position_embedding="sinusoidal")
    write_model_folder(tmp_path / "tiny", model, get_encoding("bytes"))
    with pytest.raises(UsageError, match="position_embedding='sinusoidal'"):
        push_to_hub(tmp_path / "tiny", REPO, NATIVE, api=api)
    assert hub.head(REPO) is None


@pytest.mark.usefixtures("quick")
def test_a_secret_is_refused_before_the_repository_is_made(model_folder: Path, hub: HubServer, api: HfApi) -> None:
    settings = model_folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"note": SECRET}))
    with pytest.raises(CheckpointError, match="a Hugging Face token") as refused:
        push_to_hub(model_folder, REPO, NATIVE, api=api)
    assert SECRET not in str(refused.value)
    assert hub.head(REPO) is None


def test_code_that_somebody_adds_is_not_run(model_folder: Path, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """A native model needs none, so the verification reports it only: in its own two processes."""
    push_to_hub(model_folder, REPO, NATIVE, api=api)
    config = json.loads(hub.files(REPO)["config.json"])
    mark = tmp_path / "was run"
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    changed = config | {"model_type": "gpt_kit", "auto_map": auto_map}
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    hub.plant(REPO, {"config.json": json.dumps(changed).encode(), "evil.py": code.encode()})
    report = verify_publication(REPO, api=api)
    assert not mark.exists()
    assert any("evil.py was not published with this model" in line for line in report.differences)
    assert any("config.json is not the file that was published" in line for line in report.differences)
