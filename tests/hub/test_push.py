"""Publishing over loopback: the real client, a real push, its verification in fresh processes, and faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_server
import pushing
import pytest
import torch
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, snapshot_download
from pushing import LOADER, REPO, SECRET
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt_kit_hf import (
    CheckpointError,
    EncodingOptions,
    HubError,
    ModelOptions,
    PushOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    UsageError,
    WindowOptions,
    get_chat_template,
    pull_model,
    push_to_hub,
    train,
    verify_publication,
)
from gpt_kit_hf.hub import manifest
from gpt_kit_hf.hub.manifest import PUBLICATION_FILE, read_manifest
from gpt_kit_hf.hub.secret_scan import scan_for_publication
from gpt_kit_hf.hub.verify import judge, probe_request, run_probe

pytestmark = hub_server.CLIENT_WARNINGS
hub = hub_server.hub
api = pushing.api
quick = pushing.quick
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, tiny run, with a chat template."""
    folder = tmp_path_factory.mktemp("publish")
    (folder / "text.txt").write_text("Now is the winter of our discontent made glorious summer.\n" * 60)
    train(
        RunOptions(
            training=TrainingOptions(
                output_dir=str(folder / "tiny"), max_steps=3, batch_size=2, report_to=["none"], use_cpu=True
            ),
            text=TextOptions(text_files=[str(folder / "text.txt")]),
            encoding=EncodingOptions(encoding="bytes"),
            windows=WindowOptions(max_length=32),
            model=ModelOptions(n_layer=1, n_head=2, n_embd=16, max_position_embeddings=64, initializer_range=0.3),
        ),
        stream=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    tokenizer.chat_template = get_chat_template("default")
    tokenizer.save_pretrained(folder / "tiny")
    return folder / "tiny"


# --- push, verification and pull -------------------------------------------------------------------------


def test_what_is_pushed_loads_without_the_package_to_the_bit(run: Path, hub: HubServer, tmp_path: Path) -> None:
    """The command, verification in two fresh processes included; then a third one that only knows transformers."""
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    pushed = subprocess.run(
        [sys.executable, "-m", "gpt_kit_hf.commands.main", "push", str(run), REPO, "--private"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert pushed.returncode == 0, pushed.stderr
    assert "is what was published" in pushed.stdout
    assert len(hub.commits(REPO)) == 2  # the one that makes a repository, and ours
    assert hub.other_token not in pushed.stdout + pushed.stderr
    assert hub.token not in pushed.stdout + pushed.stderr
    loaded = subprocess.run(
        [sys.executable, "-c", LOADER, REPO, str(tmp_path / "logits.safetensors"), "run its code"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    found = load_file(tmp_path / "logits.safetensors")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    ids = torch.tensor([tokenizer("Now is the winter")["input_ids"]])
    assert torch.equal(found["ids"], ids)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(found["logits"], model(ids).logits.detach())
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("quick")
def test_a_model_of_the_hub_is_trained_further_and_pushed(
    run: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    pushed = push_to_hub(run, REPO, api=api)
    (tmp_path / "text.txt").write_text("Grim-visaged war hath smooth'd his wrinkled front.\n" * 40)
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    asked = ["--text_files", "text.txt", "--output_dir", "further", "--max_length", "32", "--batch_size", "2"]
    asked += ["--max_steps", "2", "--sample_steps", "0", "--report_to", "none", "--use_cpu"]
    ended = subprocess.run(
        [sys.executable, "-m", "gpt_kit_hf.commands.main", "train", "--model_name_or_path", REPO, *asked],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "further/run.json").read_text())
    assert (record["base_model"], record["base_commit"]) == (REPO, pushed.commit)
    push_to_hub(tmp_path / "further", "ann/further", api=api)
    card = hub.files("ann/further")["README.md"].decode()
    assert f"base_model: {REPO}\n" in card
    assert f"at commit `{pushed.commit}` trained further (continued pretraining) on `text.txt`" in card


@pytest.mark.usefixtures("quick")
def test_what_is_pushed_loads_with_the_oldest_transformers_to_the_bit(
    run: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    """Without the package, in the environment of `make test-oldest`; both ways where this is the newest."""
    other = ROOT / ".venv-oldest" / "bin" / "python"
    if not other.exists():
        pytest.skip("there is no environment with the oldest transformers: make test-oldest builds it")
    push_to_hub(run, REPO, api=api)
    found = {}
    for name, python in (("here", sys.executable), ("oldest", str(other))):
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / name), "OMP_NUM_THREADS": "1"}
        output = tmp_path / f"{name}.safetensors"
        ended = subprocess.run(
            [python, "-c", LOADER, REPO, str(output), "run its code"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        found[name] = load_file(output)
    for name in ("ids", "logits"):
        assert torch.equal(found["here"][name], found["oldest"][name])


@pytest.mark.usefixtures("quick")
def test_a_commit_holds_the_model_its_code_and_its_card_and_nothing_else(
    run: Path, hub: HubServer, api: HfApi
) -> None:
    result = push_to_hub(run, REPO, api=api)
    files = hub.files(REPO, "main")
    expected = {"README.md", "config.json", "configuration_gpt_kit.py", "generation_config.json", "loss.png"}
    expected |= {"model.safetensors", "modeling_gpt_kit.py", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"chunked_loss.py", "packed_documents.py", "positions.py", "transformer_block.py"}
    expected |= {"chat_template.jinja", PUBLICATION_FILE}
    assert files.keys() - {".gitattributes"} == expected == set(result.sent)
    assert result.commit == hub.head(REPO)
    config = json.loads(files["config.json"])
    kinds = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", *(f"AutoModelFor{kind}" for kind in kinds)}
    assert b"model-index" in files["README.md"]
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()


def with_events(run: Path, folder: Path, **more: str) -> Path:
    """A copy of the run with what TensorBoard's writer writes; a file with options names a local path."""
    shutil.copytree(run, folder)
    (folder / "tensorboard" / "tiny").mkdir(parents=True)
    for began in ("1700000000", "1700000100"):
        writer = SummaryWriter(str(folder.with_name(began)))
        for step in (1, 2):
            writer.add_scalar("train/loss", 1.0 / step + float(began[-3:]), step)
        for name, text in more.items():
            writer.add_text(name, text)
        writer.close()
        [written] = folder.with_name(began).iterdir()
        written.rename(folder / "tensorboard" / "tiny" / f"events.out.tfevents.{began}.my-laptop.77.0")
    options = SummaryWriter(str(folder / "tensorboard" / "tiny" / "1700000001.5"))
    options.add_text("text.text_files", "/home/ann/text.txt")
    options.close()
    return folder


@pytest.mark.usefixtures("quick")
def test_the_curves_of_tensorboard_are_published_without_the_options_and_the_name_of_the_machine(
    run: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    api.create_repo(REPO)
    hub.plant(REPO, {"events.out.tfevents.1600000000.0": b"of an earlier model"})
    own = with_events(run, tmp_path / "own")
    result = push_to_hub(own, REPO, api=api)
    files = {name: data for name, data in hub.files(REPO, "main").items() if "tfevents" in name}
    names = ["events.out.tfevents.1700000000.0", "events.out.tfevents.1700000100.1"]
    assert sorted(files) == names
    assert result.removed == ("events.out.tfevents.1600000000.0",)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name, first in zip(names, (1.0, 101.0), strict=True):
        read = EventAccumulator(str(tmp_path / name)).Reload()
        assert [event.value for event in read.Scalars("train/loss")] == pytest.approx([first, first - 0.5])
    assert push_to_hub(own, REPO, api=api).sent == {}
    assert pull_model(REPO, tmp_path / "pulled", api=api).joinpath(names[0]).read_bytes() == files[names[0]]
    without = push_to_hub(own, REPO, PushOptions(tensorboard=False), api=api)
    assert without.removed == tuple(names)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("text", "fault"),
    [("hf_" + "a" * 30, "a Hugging Face token"), ("it is in /home/ann/secret.txt", "a path of a machine")],
)
def test_curves_with_a_secret_or_a_path_are_refused(
    text: str, fault: str, run: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    own = with_events(run, tmp_path / "own", note=text)
    with pytest.raises(CheckpointError, match=f"tfevents.* cannot be published: .*{fault}"):
        push_to_hub(own, REPO, api=api)
    assert push_to_hub(own, REPO, PushOptions(tensorboard=False), api=api).commit is not None


def test_curves_that_are_too_large_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = with_events(run, tmp_path / "own")
    monkeypatch.setattr(manifest, "_MAX_EVENT_BYTES", 100)
    (tmp_path / "stage").mkdir()
    with pytest.raises(UsageError, match=r"more than the 0 MB that are published: leave them out by --tensorboard"):
        manifest.stage_files(own, tmp_path / "stage", tensorboard=True)


@pytest.mark.usefixtures("quick")
def test_a_second_push_changes_nothing_and_a_changed_model_is_one_more_commit(
    run: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    push_to_hub(run, REPO, api=api)
    head = hub.head(REPO)
    again = push_to_hub(run, REPO, api=api)
    assert (again.commit, again.sent, again.removed) == (head, {}, ())
    assert hub.head(REPO) == head
    hub.plant(REPO, {"model-00001-of-00002.safetensors": b"x" * 50, "pytorch_model.bin": b"y", "notes.md": b"mine"})
    changed = shutil.copytree(run, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    result = push_to_hub(changed, REPO, PushOptions(keep_card="run"), api=api)
    assert "model.safetensors" in result.sent
    assert set(result.removed) == {"model-00001-of-00002.safetensors", "pytorch_model.bin"}
    assert "notes.md" in hub.files(REPO, "main")  # another's file stays
    assert len(hub.commits(REPO)) == 4


@pytest.mark.usefixtures("quick")
def test_branch_pull_request_and_dry_run(run: Path, hub: HubServer, api: HfApi) -> None:
    dry = push_to_hub(run, REPO, PushOptions(dry_run=True), api=api)
    assert (dry.commit, dry.verification) == (None, None)
    assert dry.sent["model.safetensors"] == (run / "model.safetensors").stat().st_size
    assert hub.head(REPO) is None
    assert not [each for each in hub.requests if each.method in ("POST", "PUT") and "validate" not in each.path]
    push_to_hub(run, REPO, PushOptions(revision="next"), api=api)
    assert "model.safetensors" in hub.files(REPO, "next")
    assert "model.safetensors" not in hub.files(REPO, "main")
    before = hub.head(REPO)
    proposed = push_to_hub(run, REPO, PushOptions(create_pr=True), api=api)
    assert hub.head(REPO) == before
    assert hub.head(REPO, "refs/pr/1") == proposed.commit


@pytest.mark.usefixtures("quick")
def test_edits_of_the_card_on_the_hub_survive(run: Path, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    push_to_hub(run, REPO, api=api)
    card = hub.files(REPO, "main")["README.md"].decode()
    hub.plant(REPO, {"README.md": (card + "\n## Thanks\n\nTo my cat.\n").encode()})
    push_to_hub(run, REPO, api=api)
    assert "To my cat." in hub.files(REPO, "main")["README.md"].decode()
    own = shutil.copytree(run, tmp_path / "own")
    (own / "README.md").write_text(card + "\n## Thanks\n\nTo my dog.\n")
    with pytest.raises(
        HubError, match=r"its card was edited on the Hub and in own/README\.md: choose which text to keep"
    ):
        push_to_hub(own, REPO, api=api)
    push_to_hub(own, REPO, PushOptions(keep_card="run"), api=api)
    assert "To my dog." in hub.files(REPO, "main")["README.md"].decode()


@pytest.mark.usefixtures("quick")
def test_pull_gives_the_same_files_and_runs_no_code(run: Path, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    push_to_hub(run, REPO, api=api)
    hub.plant(REPO, {"modeling_gpt_kit.py": b"raise SystemExit('ran')\n", "evil.pkl": b"\x80\x04."})
    folder = pull_model(REPO, tmp_path / "pulled", api=api)
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert not (folder / "model.safetensors").is_symlink()
    assert not (folder / "evil.pkl").exists()
    with pytest.raises(UsageError, match="is not empty"):
        pull_model(REPO, folder, api=api)


# --- faults of the Hub ------------------------------------------------------------------------------------

_UPLOADS = [
    Fault("POST", r"/api/repos/create", "status", status=500),
    Fault("POST", r"/preupload/", "status", status=503),
    Fault("POST", r"/preupload/", "drop"),
    Fault("POST", r"/objects/batch", "status", status=500),
    Fault("POST", r"/objects/batch", "truncate"),
    Fault("PUT", r"/lfs-store/", "status", status=500),
    Fault("PUT", r"/lfs-store/", "cut_upload"),
    Fault("PUT", r"/lfs-store/", "drop"),
    Fault("POST", r"/objects/verify", "status", status=500),
    Fault("POST", r"/commit/", "status", status=500),
    Fault("POST", r"/commit/", "status", status=412),
    Fault("POST", r"/commit/", "drop"),
    Fault("POST", r"/commit/", "lose_answer"),
    Fault("POST", r"/commit/", "cut_upload"),
    Fault("POST", r"/commit/", "truncate"),
    Fault("GET", r"/tree/", "status", status=500, times=9),
    Fault("GET", r"/resolve/.*safetensors", "flip"),
    Fault("GET", r"/resolve/.*config.json", "flip"),
    Fault("GET", r"/resolve/.*modeling", "truncate", times=30),
    Fault("HEAD", r"/resolve/", "status", status=500, times=30),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", _UPLOADS, ids=lambda f: f"{f.method}-{f.kind}-{f.path.strip('/')}-{f.status}")
def test_the_head_is_the_old_commit_or_the_whole_new_one_and_a_second_push_converges(
    fault: Fault, run: Path, hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    if "create" not in fault.path:
        hub.create(REPO)
    before = hub.head(REPO)
    armed = hub.fail(fault)
    message = None
    try:
        push_to_hub(run, REPO, api=api)
    except HubError as error:
        message = str(error)
    assert message is None or "\n" not in message
    assert armed.fired >= 1
    head = hub.head(REPO)
    if head != before:
        whole = read_back(hub)
        assert whole["model.safetensors"] == (run / "model.safetensors").read_bytes()
        assert whole.keys() >= {"config.json", "README.md", "modeling_gpt_kit.py", PUBLICATION_FILE}
    elif message is not None:
        assert "model.safetensors" not in (read_back(hub) if before else {})
    hub.clear_faults()
    done = push_to_hub(run, REPO, api=api)
    assert done.verification is not None
    assert done.commit == hub.head(REPO)
    if head != before:
        assert done.commit == head  # nothing had to be sent again


def read_back(hub: HubServer) -> dict[str, bytes]:
    return hub.files(REPO, "main")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["flip", "truncate"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_or_cut_download_is_refused_and_not_kept(
    kind: Any, name: str, run: Path, hub: HubServer, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    push_to_hub(run, REPO, api=api)
    armed = hub.fail(Fault("GET", rf"/resolve/.*{name}", kind, times=1 if kind == "flip" else 30))
    with pytest.raises(HubError, match=f"{REPO} was not fetched"):
        pull_model(REPO, tmp_path / "pulled", api=api)
    assert armed.fired >= 1
    assert not (tmp_path / "pulled").exists()
    hub.clear_faults()
    folder = pull_model(REPO, tmp_path / "pulled", api=api)
    assert (folder / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.usefixtures("quick")
def test_errors_name_the_next_step(run: Path, hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    stranger = HfApi(endpoint=hub.url, token=False)
    nobody = HfApi(endpoint=hub.url, token="hf_wrongwrongwrongwrong")
    with pytest.raises(HubError, match="name it OWNER/NAME"):
        push_to_hub(run, "a b/c", api=api)
    with pytest.raises(HubError, match="log"):
        push_to_hub(run, REPO, api=stranger)
    with pytest.raises(HubError, match="hf auth login") as refused:
        push_to_hub(run, REPO, api=nobody)
    assert "wrongwrong" not in str(refused.value)
    with pytest.raises(HubError, match="there is no such repository"):
        pull_model("ann/absent", tmp_path / "absent", api=api)
    with pytest.raises(UsageError, match="no such folder"):
        push_to_hub(tmp_path / "nowhere", REPO, api=api)
    closed = HfApi(endpoint="http://127.0.0.1:9", token=hub.token)
    with pytest.raises(HubError, match="run the same command again"):
        push_to_hub(run, REPO, api=closed)


# --- faults planted in what was published -----------------------------------------------------------------


def changed_json(content: bytes, **values: Any) -> bytes:
    return json.dumps(json.loads(content) | values).encode()


def changed_weights(content: bytes, place: Path, change: Any) -> bytes:
    (place / "before").write_bytes(content)
    weights = change(load_file(place / "before"))
    save_file(weights, place / "after", {"format": "pt"})
    return (place / "after").read_bytes()


def swapped_tokens(content: bytes) -> bytes:
    tokenizer = json.loads(content)
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    return json.dumps(tokenizer).encode()


def without_ends(code: bytes) -> bytes:
    """Code whose loss ignores EOS, as code does that masks padding by its id."""
    text = code.decode()
    marks = "        if labels is not None:\n            labels = labels.masked_fill(labels == 256, -100)\n"
    head = text.index("class GPTKitForCausalLM")
    at = text.index("        outputs", text.index("def forward", head))
    return (text[:at] + marks + text[at:]).encode()


def planted(files: dict[str, bytes], place: Path) -> dict[str, tuple[dict[str, bytes | None], str]]:
    """By name: the changes to the published commit, and what must be reported besides differing files."""
    weights, config, generation = (files[n] for n in ("model.safetensors", "config.json", "generation_config.json"))
    auto_map = json.loads(config)["auto_map"]
    head = {"lm_head.weight": torch.zeros(258, 16)}
    flipped = bytearray(weights)
    flipped[-2] ^= 0x10
    half = {"dtype": "bfloat16"}
    return {
        "missing code": ({"modeling_gpt_kit.py": None}, r"modeling_gpt_kit\.py is missing on the Hub"),
        "missing part of the code": ({"packed_documents.py": None}, r"packed_documents\.py is missing on the Hub"),
        "missing weights": ({"model.safetensors": None}, r"model\.safetensors is missing on the Hub"),
        "wrong tokenizer": (
            {"tokenizer.json": swapped_tokens(files["tokenizer.json"])},
            "not the one of the training",
        ),
        "untied head": (
            {
                "config.json": changed_json(config, tie_word_embeddings=False),
                "model.safetensors": changed_weights(weights, place, lambda w: w | head),
            },
            r"model\.tied is false, was true",
        ),
        "padding is the end": (
            {"tokenizer_config.json": changed_json(files["tokenizer_config.json"], pad_token="<|endoftext|>")},
            "the tokenizer pads with its EOS token",
        ),
        "end scored wrongly": (
            {"modeling_gpt_kit.py": without_ends(files["modeling_gpt_kit.py"])},
            "the loss of a row that ends with EOS is wrong",
        ),
        "missing auto_map entry": (
            {"config.json": changed_json(config, auto_map={k: v for k, v in auto_map.items() if k != "AutoModel"})},
            r"config\.json has no auto_map entry for AutoModel",
        ),
        "changed generation config": (
            {"generation_config.json": changed_json(generation, eos_token_id=3)},
            r"generation_config\.eos_token_id is 3, was 256",
        ),
        "flipped weight": ({"model.safetensors": bytes(flipped)}, r"model\.safetensors is not the file"),
        "other dtype": (
            {
                "config.json": changed_json(config, **half),
                "model.safetensors": changed_weights(
                    weights, place, lambda w: {k: v.bfloat16() for k, v in w.items()}
                ),
            },
            r"model\.dtypes is",
        ),
        "stale code": (
            {"configuration_gpt_kit.py": files["configuration_gpt_kit.py"] + b"# older\n"},
            r"configuration_gpt_kit\.py is not the file that was published",
        ),
        "broken template": ({"chat_template.jinja": b"{% for m in messages %}"}, "template cannot be used"),
        "other template": ({"chat_template.jinja": b"{{ messages[0].content }}"}, r"template\.written is"),
        "pickle beside": ({"pytorch_model.bin": b"\x80\x04."}, r"pytorch_model\.bin"),
        "changed configuration": (
            {"config.json": changed_json(config, layer_norm_epsilon=0.5)},
            r"config\.layer_norm_epsilon is 0\.5, was",
        ),
        "a secret": ({"README.md": files["README.md"] + f"\n{SECRET}\n".encode()}, "a Hugging Face token"),
    }


@pytest.mark.usefixtures("quick")
def test_verification_names_each_fault_planted_in_a_commit(
    run: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    """All of them in the two fresh processes of the verification, with and without the package."""
    push_to_hub(run, REPO, api=api)
    files = {name: content for name, content in hub.files(REPO, "main").items() if name != ".gitattributes"}
    faults = planted(files, tmp_path) | {"nothing": ({}, "")}
    commits, folders = {}, {}
    for number, (name, (changes, _)) in enumerate(faults.items()):
        repo = f"ann/fault-{number}"
        hub.create(repo)
        whole = {path: content for path, content in {**files, **changes}.items() if content is not None}
        commits[name] = (repo, hub.plant(repo, whole))
        folders[name] = Path(
            snapshot_download(repo, revision=commits[name][1], cache_dir=tmp_path / "seen", endpoint=hub.url)
        )
    answers = {}
    for with_package in (True, False):
        work = tmp_path / f"work-{with_package}"
        requests = [probe_request(repo, work, commit) for repo, commit in commits.values()]
        answers[with_package] = dict(zip(commits, run_probe(requests, work, with_package, api), strict=True))
    published = read_manifest(folders["nothing"])
    for name, (_, expected) in faults.items():
        for local in (published, None):  # with what was sent at hand, and by what the repository says of itself
            report = judge(*commits[name], folders[name], answers[True][name], answers[False][name], local)
            assert any(re.search(expected, line) for line in report.differences) or not expected, (name, report)
            assert SECRET not in str(report.differences)
            if not expected:
                assert report.differences == ()
            else:
                with pytest.raises(HubError, match="is not what was published"):
                    report.require()


@pytest.mark.usefixtures("quick")
def test_verification_alone_names_later_changes(run: Path, hub: HubServer, api: HfApi) -> None:
    push_to_hub(run, REPO, api=api)
    verify_publication(REPO, api=api).require()
    hub.plant(REPO, {"config.json": changed_json(hub.files(REPO, "main")["config.json"], initializer_range=0.5)})
    report = verify_publication(REPO, api=api)
    expected = "config.initializer_range is 0.5, was 0.3"
    assert any(expected in line for line in report.differences), report.differences


# --- what must not be published ---------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("place", ["config", "tokenizer", "template", "options", "metrics", "card", "metadata"])
def test_a_secret_in_a_run_reaches_neither_the_hub_nor_a_message(
    place: str, run: Path, hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    if place == "config":
        (own / "config.json").write_bytes(changed_json((own / "config.json").read_bytes(), note=SECRET))
    elif place == "tokenizer":
        file = own / "tokenizer_config.json"
        file.write_bytes(changed_json(file.read_bytes(), note=SECRET))
    elif place == "template":
        (own / "chat_template.jinja").write_text("{# " + SECRET + " #}{{ messages[0].content }}")
    elif place == "options":
        options = json.loads((own / "options.json").read_text())
        for group in options.values():
            if isinstance(group, dict):
                group |= {key: SECRET for key in group if isinstance(group[key], str)} | {"token": SECRET}
        (own / "options.json").write_text(json.dumps(options))
        record = json.loads((own / "run.json").read_text())
        (own / "run.json").write_text(json.dumps(record | {"options": options, "note": SECRET}))
    elif place == "metrics":
        with (own / "metrics.jsonl").open("a") as file_of_lines:
            file_of_lines.write(json.dumps({"kind": "note", "step": 3, "text": SECRET}) + "\n")
    elif place == "card":
        (own / "README.md").write_text(f"---\nlicense: mit\n---\n\nMy token is {SECRET}.\n")
    else:
        weights = load_file(own / "model.safetensors")
        save_file(weights, own / "model.safetensors", {"format": "pt", "made_by": SECRET})
    captured: list[str] = []
    try:
        push_to_hub(own, REPO, api=api, log=captured.append)
    except (CheckpointError, UsageError, HubError) as error:
        captured.append(str(error))
        assert place not in ("options", "metrics")
    else:
        assert place in ("options", "metrics")
    assert SECRET not in "\n".join(captured)
    commits = hub.commits(REPO) if hub.head(REPO) else []  # most are refused before the repository is made
    everything = [content for commit in commits for content in hub.files(REPO, commit).values()]
    assert not [content for content in everything if SECRET.encode() in content]


def test_the_scan_refuses_by_name_and_place(tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes, str]] = {
        "a.txt": (b"one\ntwo AKIAABCDEFGHIJKLMNOP\n", "line 2 holds what looks like an AWS key"),
        "b.json": (b'{"path": "/home/ann/models/x"}', "line 1 holds a path of a machine"),
        "c.md": (b"see C:\\Users\\ann\\x", "a path of a machine"),
        "d.bin": (b"abc", "by its name it is a pickle"),
        "e.json": (b"\x80\x04\x95", "it holds a pickle"),
        "f.json": (b"PK\x03\x04aaaa", "it is a zip archive"),
        "optimizer.safetensors": (b"", "it belongs to a run or a checkpoint"),
        "training_state.json": (b"{}", "it belongs to a run or a checkpoint"),
        "g.md": (b"https://ann:secretword@example.com/", "a password in an address"),
        "h.md": (b'api_key = "abcdefgh12345"', "a secret"),
        "i.py": (b"-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        "j.txt": (b"\xff\xfe", "it is not text"),
    }
    for name, (content, expected) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} cannot be published: .*{expected}") as refused:
            scan_for_publication(folder)
        assert "\n" not in str(refused.value)
    folder = tmp_path / "optimizer"
    folder.mkdir()
    save_file({"layers.0.exp_avg": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the state of an optimizer"):
        scan_for_publication(folder)
    harmless = tmp_path / "harmless"
    harmless.mkdir()
    (harmless / "README.md").write_text("See https://huggingface.co/home/x and runs/mine; and/or tmp/x.\n")
    (harmless / "tokenizer.json").write_text('{"model": {"vocab": {"/home/user/x": 1}}}')
    scan_for_publication(harmless)
