"""Untrusted model folders: each malicious one is refused in one line from headers alone, good ones pass."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torchao.quantization  # type: ignore[import-untyped]
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from shapes import MODERN
from test_pretrain import killed_copy
from test_pretrain import options as run_options
from tiny_model import write_tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM, GPTKitModel, create_model_config, train
from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.hub import safety
from gpt_kit_hf.hub.safety import check_model_folder
from gpt_kit_hf.model.checkpoints.layouts import stored_shapes
from gpt_kit_hf.storage.checkpoints import list_checkpoints, save_checkpoint, verify_checkpoint
from gpt_kit_hf.training.lora import load_adapter

Change = Callable[[Path], None]
PICKLES = (
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "last.ckpt", "weights.pickle"),
    *("training_args.bin", "optimizer.pt", "random_states_0.pkl", "adapter_model.bin", "__0_0.distcp", ".metadata"),
)
SHAPE = {"vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "max_position_embeddings": 24}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this package's model, 1 layer, 16 wide."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder)
    return folder


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def tiny_adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    wrapped.save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """An adapter to change."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint of a run."""

    def write(folder: Path) -> None:
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        moments = {f"{key}.{name}": tensor for key in ("exp_avg", "exp_avg_sq") for name, tensor in weights.items()}
        save_file({k: v.clone() for k, v in moments.items()}, folder / "optimizer.safetensors")
        (folder / "training_state.json").write_text('{"step": 3}')

    return save_checkpoint(tmp_path / "run", 3, write, keep_last=1)


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Count the bytes read of each file; only regular files may be opened, only meta models built."""
    counted: dict[str, int] = {}
    plain_open = Path.open

    def counting_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        assert path.is_file(), f"{path} would be waited for"
        file = plain_open(path, *args, **kwargs)
        read = file.read

        def counting_read(size: int = -1) -> bytes:
            data: bytes = read(size)
            counted[path.name] = counted.get(path.name, 0) + len(data)
            return data

        return mock.MagicMock(wraps=file, read=counting_read, __enter__=lambda opened: opened, __exit__=close)

    def close(opened: Any, *_: Any) -> None:
        opened.close()

    plain_init = PreTrainedModel.__init__

    def build_on_meta(model: Any, *args: Any, **kwargs: Any) -> None:
        assert torch.get_default_device().type == "meta", "a model was built in memory"
        plain_init(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", counting_open)
        patch.setattr(PreTrainedModel, "__init__", build_on_meta)
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
        yield counted


def refusal(folder: Path) -> str:
    """Return the message that refuses a folder; no model takes memory, no pickle is read, nothing blocks."""
    with watched(), pytest.raises(CheckpointError) as caught:
        check_model_folder(folder)
    line = str(caught.value)
    assert len(line) < len(str(folder)) + 300
    assert line.isprintable()
    return line


def edit(name: str, **changes: Any) -> Change:
    """Change values of a JSON file."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**settings, **changes}))

    return change


def put(name: str, data: bytes | str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def write_header(path: Path, header: Mapping[str, Any] | bytes, data: int = 0) -> None:
    """Write a safetensors file with a hole of so many bytes as its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + data)


def write_shapes(path: Path, shapes: Mapping[str, Any]) -> None:
    """Write float32 zeros of these shapes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    write_header(path, header, end)


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(entries: Mapping[str, Any] | bytes, data: int = 0, name: str = "model.safetensors") -> Change:
    return lambda folder: write_header(folder / name, entries, data)


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    GPTKitForCausalLM(GPTKitConfig(**SHAPE)).save_pretrained(folder, max_shard_size="4KB")


def shards(value: Any) -> Change:
    """Shard the weights, then let the index point to another file for one tensor."""

    def change(folder: Path) -> None:
        sharded(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = value
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def index_of(weight_map: object) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        edit("model.safetensors.index.json", weight_map=weight_map)(folder)

    return change


def misnamed(folder: Path) -> None:
    name = "a\n\x1b[2J.safetensors"
    put(name, "x")(folder)
    edit("config.json", transformers_weights=name)(folder)


def shard_emptied(folder: Path) -> None:
    sharded(folder)
    write_header(min(folder.glob("model-*")), {})


def shard_copied(folder: Path) -> None:
    sharded(folder)
    first, second, *_ = sorted(folder.glob("model-*"))
    shutil.copy(first, second)


def instead(kind: Callable[[Path], Any], *names: str) -> Change:
    """Replace files by something that is no regular file."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)
            kind(folder / name)

    return change


def link_out(path: Path) -> None:
    secret = path.parent.parent / f"outside-{path.name}"
    secret.write_text("{}")
    path.symlink_to(secret)


def with_manifest(folder: Path, step: int = 3) -> Path:
    """Write the manifest of the folder's present files."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    assert verify_checkpoint(folder) == []
    return folder


# --- what is refused

BAD_SIZES: dict[str, list[Any]] = {
    "n_layer": [-1, 0, 2, 900, 50_000, 10**9, 10**40, "12", 1.0, True, [1], [[10**9]], {"n_layer": 1}],
    "n_embd": [0, 32, 10**9],
    "n_head": [3, 10**9, "2"],
    "vocab_size": [-5, 256, 10**9],
    "n_inner": [10**9, 17],
    "max_position_embeddings": [10**9, 65],
    "num_labels": [10**9],
    "hidden_size": [32],
    "embd_pdrop": ["x", 2.0],
    "use_bias": [False],
    "nlayer": [7],
}
SIZES: dict[str, Change] = {
    f"{name}={value!r}": edit("config.json", **{name: value}) for name, values in BAD_SIZES.items() for value in values
}
SETTINGS: dict[str, tuple[Change, str]] = {
    "code for an unknown type": (
        edit("config.json", model_type="evil", auto_map={"AutoConfig": "modeling_evil.C"}),
        r"config.json: model_type 'evil' needs code of its own",
    ),
    "code for a head": (edit("config.json", model_type="clip"), "model_type 'clip' needs code of its own"),
    "code map of another kind": (edit("config.json", auto_map=3), "auto_map is 3; it must be a JSON object"),
    "model type of another kind": (edit("config.json", model_type=["gpt_kit"]), "needs code of its own"),
    "tokenizer's code": (
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}, tokenizer_class="T"),
        "tokenizer_config.json: the tokenizer needs code of its own",
    ),
    "tokenizer's code, old form": (edit("tokenizer_config.json", auto_map=["t.T", None]), "needs code of its own"),
    "tokenizer's files": (edit("tokenizer_config.json", init_inputs=["/dev/zero"]), "init_inputs names what to read"),
    "another configuration": (
        edit("config.json", configuration_files=["config.4.0.0.json"]),
        "configuration_files names other files",
    ),
    "kernel": (edit("config.json", attn_implementation="evil/kernel"), "attn_implementation is 'evil/kernel', code"),
    "kernel, hidden": (edit("config.json", text_config={"_attn_implementation": {"": "a/b"}}), "'a/b', code from the"),
    "other weights": (edit("config.json", transformers_weights="../w.safetensors"), "transformers_weights is '../w"),
    "no object": (put("config.json", "[1]"), "config.json: it must be a JSON object, is a list"),
    "no JSON": (put("tokenizer.json", "{"), "tokenizer.json: it is not valid JSON"),
    "no text": (put("tokenizer_config.json", b'{"a": "\xff"}'), "tokenizer_config.json: it is not valid JSON"),
    "deep": (put("generation_config.json", '{"a":' + "[" * 200_000), "generation_config.json: it is not valid JSON"),
    "many values": (put("config.json", '{"a":[' + "0," * 800_000 + "0]}"), "more than the 750,000 values"),
    "many tokens": (put("tokenizer.json", '{"a":[' + "0," * 3_100_000 + "0]}"), "more than the 3,000,000 values"),
    "long": (put("generation_config.json", '{"a":"' + "x" * (4 << 20) + '"}'), "it has 4,194,312 bytes; such a file"),
    "long vocabulary": (
        lambda folder: os.truncate(folder / "tokenizer.json", 1 << 40),
        "tokenizer.json: it has 1,099",
    ),
    "long template": (put("chat_template.jinja", "x" * (2 << 20)), "chat_template.jinja: it has 2,097,152 bytes"),
    "long template beside": (put("additional_chat_templates/a.jinja", "x" * (2 << 20)), "a.jinja: it has 2,097,152"),
    "many fields": (edit("config.json", **{f"n_layer{number}": 1 for number in range(1000)}), "it may have 1,000"),
    "many digits": (put("config.json", '{"a": ' + "9" * 5000 + "}"), "config.json: it is not valid JSON"),
    "moves of the cursor": (misnamed, r"/a \?\[2J.safetensors: its header claims 120 bytes"),
}
WEIGHTS: dict[str, tuple[Change, str]] = {
    "header bomb": (header(b"{}", 1 << 40), "not valid safetensors: .*not fully covered"),
    "header beyond the file": (
        put("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
        "its header claims 4,611",
    ),
    "header too long": (header(b" " * (17 << 20)), "its header claims 17,825,792 bytes of 17,825,800; it may have"),
    "no header": (put("model.safetensors", b"x"), "its header claims 120 bytes of 1"),
    "empty": (put("model.safetensors", b""), "its header claims 0 bytes of 0"),
    "no tensors": (header({"__metadata__": {"format": "pt"}}), "it holds no tensors"),
    "pickle by that name": (put("model.safetensors", pickle.dumps({"w": 1}) * 9), "its header claims"),
    "header no JSON": (header(b"{oops"), "not valid safetensors: .*invalid JSON in header"),
    "header twice a name": (header(b'{"a": {}, "a": {}}'), "not valid safetensors: .*invalid JSON in header"),
    "header twice a tensor": (
        header(
            json.dumps({"a": tensor()}).encode()[:-1]
            + b', "a": '
            + json.dumps(tensor("F32", [1], [8, 12])).encode()
            + b"}",
            12,
        ),
        "not valid safetensors: ",
    ),
    "header of many": (header(b'{"a": [' + b"0," * 800_000 + b"0]}"), "more than the 750,000 values"),
    "no entry": (header({"a": 3}), "not valid safetensors: .*integer `3`, expected struct"),
    "unknown type": (header({"a": tensor("PY")}, 8), "not valid safetensors: .*unknown variant `PY`"),
    "negative size": (header({"a": tensor(shape=[-2])}, 8), "not valid safetensors: .*integer `-2`"),
    "true size": (header({"a": tensor(shape=[True, 2])}, 8), "not valid safetensors: .*boolean `true`"),
    "vast size": (header({"a": tensor(shape=[1 << 64])}, 8), "not valid safetensors: .*floating point"),
    "vast product": (header({"a": tensor(shape=[1 << 62] * 64)}, 8), "not valid safetensors: .*overflow"),
    "many dimensions": (header({"a": tensor(shape=[1] * 65)}, 4), "not valid safetensors: .*invalid shape"),
    "offsets no pair": (header({"a": tensor(offsets=[0])}, 8), "not valid safetensors: .*invalid length 1"),
    "offsets backwards": (
        header({"a": tensor(offsets=[8, 0])}, 8),
        "not valid safetensors: .*invalid offset for tensor `a`",
    ),
    "offsets of another size": (
        header({"a": tensor(shape=[3])}, 8),
        "not valid safetensors: .*invalid shape, data type, or offset",
    ),
    "outside the file": (header({"a": tensor()}, 4), "not valid safetensors: .*not fully covered"),
    "overlapping": (
        header({"a": tensor(), "b": tensor(offsets=[4, 12])}, 12),
        "not valid safetensors: .*invalid offset for tensor `b`",
    ),
    "a hole": (
        header({"a": tensor(), "b": tensor(offsets=[12, 20])}, 20),
        "not valid safetensors: .*invalid offset for tensor `b`",
    ),
    "bytes behind": (header({"a": tensor()}, 12), "not valid safetensors: .*not fully covered"),
    "half a byte": (header({"a": tensor("F4", [3], [0, 1])}, 1), "not valid safetensors: .*byte boundary"),
    "index of nothing": (index_of(None), "it has no weight_map from tensors to files"),
    "shard above": (shards("../model.safetensors"), r"index.json: it points to '../model.safetensors'; a shard must"),
    "shard elsewhere": (shards("/etc/passwd"), "it points to '/etc/passwd'"),
    "shard by backslash": (shards("..\\w.safetensors"), "it points to "),
    "shard that is a pickle": (shards("pytorch_model.bin"), "it points to 'pytorch_model.bin'"),
    "shard that is missing": (shards("model-9.safetensors"), "it points to 'model-9.safetensors'"),
    "shard of another kind": (shards(["model.safetensors"]), r"it points to \['model.safetensors'\]"),
    "shard without its tensors": (shard_emptied, "which no shard holds"),
    "shard twice": (shard_copied, "which another shard holds, too"),
    "distributed": (
        header({}, 0, "shard-00000-model-00001-of-00001.safetensors"),
        "a shard of a distributed checkpoint",
    ),
}
LINKS: dict[str, tuple[Change, str]] = {
    **{
        f"link: {name}": (instead(link_out, name), f"{name}: it is a link out of its folder")
        for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "merges.txt")
    },
    "link to a device": (instead(lambda path: path.symlink_to("/dev/zero"), "config.json"), "link out of its folder"),
    "link to itself": (instead(lambda path: path.symlink_to(path.name), "config.json"), "it cannot be read"),
    "link to nothing": (instead(lambda path: path.symlink_to("nothing"), "model.safetensors"), "it cannot be read"),
    "pipe: weights": (instead(os.mkfifo, "model.safetensors"), "model.safetensors: it must be a regular file"),
    "pipe: configuration": (instead(os.mkfifo, "config.json"), "config.json: it must be a regular file"),
    "pipe: tokenizer": (instead(os.mkfifo, "tokenizer.json"), "tokenizer.json: it must be a regular file"),
    "pipe: other weights": (instead(os.mkfifo, "other.safetensors"), "other.safetensors: it must be a regular file"),
    "folder": (instead(Path.mkdir, "model.safetensors"), "model.safetensors: it must be a regular file"),
}


MALICIOUS = {**{name: (change, r"/config\.json: ") for name, change in SIZES.items()}, **SETTINGS, **WEIGHTS, **LINKS}
# In a checkpoint the manifest's own check finds the links, and reads all bytes before.
STATED = {name: MALICIOUS[name] for name in MALICIOUS.keys() - LINKS.keys() - {"header bomb", "long vocabulary"}}


@pytest.mark.parametrize(("change", "line"), MALICIOUS.values(), ids=MALICIOUS)
def test_a_malicious_model_is_refused(change: Change, line: str, model: Path) -> None:
    change(model)
    assert re.search(line, refusal(model))


@pytest.mark.parametrize(("change", "line"), [STATED[name] for name in sorted(STATED)], ids=sorted(STATED))
def test_a_malicious_checkpoint_is_refused_whatever_its_manifest_says(
    change: Change, line: str, checkpoint: Path
) -> None:
    change(checkpoint)
    assert re.search(line, refusal(with_manifest(checkpoint)))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        *((put(name, "x"), f"{name}: it is a pickle") for name in PICKLES),
        (put("state/random_states_0.pkl", "x"), "random_states_0.pkl: it is a pickle"),
        (put("state/shard.safetensors", "x"), "shard.safetensors: its header claims"),
        (put("optimizer.safetensors", struct.pack("<Q", 1 << 40)), "optimizer.safetensors: its header claims 1,099"),
        (header({"a": tensor(shape=[10**6], offsets=[0, 4 * 10**6])}, 4 * 10**6, "optimizer.safetensors"), "too many"),
        (put("training_state.json", "[]"), "training_state.json: it must be a JSON object"),
        (put("training_state.json", '{"a": [' + "0," * 800_000 + "0]}"), "training_state.json: it holds more than"),
    ],
)
def test_a_malicious_state_is_refused(change: Change, line: str, checkpoint: Path) -> None:
    change(checkpoint)
    assert re.search(line, refusal(with_manifest(checkpoint)))


def test_a_manifest_that_is_no_object_is_refused(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[]")
    assert "manifest.json: it must be a JSON object" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            edit("adapter_config.json", peft_type="PROMPT_TUNING"),
            "peft_type is 'PROMPT_TUNING'; only adapters of type",
        ),
        (
            edit("adapter_config.json", megatron_config={"a": 1}),
            "megatron_config is set; only adapters that add matrices",
        ),
        (
            edit("adapter_config.json", layer_replication=[[0, 50_000]]),
            "layer_replication is set; only adapters that add matrices",
        ),
        *((edit("adapter_config.json", r=rank), "the rank is ") for rank in (0, -1, 10**9, "2", True, None)),
        (edit("adapter_config.json", rank_pattern={"q_proj": 10**9}), "the rank is 1000000000"),
        (edit("adapter_config.json", rank_pattern=[1 << 40]), "the rank is "),
        (
            instead(lambda path: path.with_suffix(".bin").write_bytes(b"x"), "adapter_model.safetensors"),
            "must be safet",
        ),
        (header({"a": tensor("PY")}, 8, "adapter_model.safetensors"), "not valid safetensors: .*unknown variant `PY`"),
        (instead(os.mkfifo, "adapter_model.safetensors"), "it must be a regular file"),
        (instead(os.mkfifo, "adapter_config.json"), "it must be a regular file"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_malicious_adapter_is_refused(change: Change, line: str, alone: bool, adapter: Path, tiny: Path) -> None:
    if not alone:  # transformers takes both then
        shutil.copytree(tiny, adapter, dirs_exist_ok=True)
    check_model_folder(adapter)
    change(adapter)
    assert re.search(line, refusal(adapter))


def test_the_base_of_an_adapter_is_checked_too(adapter: Path, model: Path, tmp_path: Path) -> None:
    edit("adapter_config.json", base_model_name_or_path=str(model))(adapter)
    check_model_folder(adapter)
    edit("config.json", n_layer=900)(model)
    assert refusal(adapter).startswith(f"{model}/config.json: n_layer is 900")
    edit("adapter_config.json", base_model_name_or_path=str(adapter))(adapter)
    assert refusal(adapter).endswith("it holds no config.json")
    for elsewhere in ("someone/model", "x" * 5000, "\0", None):
        edit("adapter_config.json", base_model_name_or_path=elsewhere)(adapter)
        check_model_folder(adapter)


def test_a_checkpoint_holds_regular_files_only(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "state").mkdir()
    moments, outside = checkpoint / "state" / "moments.safetensors", tmp_path / "outside.safetensors"
    os.mkfifo(moments)
    assert "moments.safetensors: it must be a regular file" in refusal(checkpoint)
    moments.unlink()
    write_header(outside, {})
    moments.symlink_to(outside)
    assert "moments.safetensors: it is a link out of its folder" in refusal(checkpoint)


def test_numbers_of_files_and_tensors_are_bounded(
    model: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(safety, "_MAX_FILES", 3)
        assert re.search(r"it holds \d model files; 3 are allowed", refusal(model))
    with monkeypatch.context() as patch:
        patch.setattr(safety, "_MAX_TENSORS", 3)
        assert "its state has more than the 3 tensors that it may have" in refusal(checkpoint)
    sharded(model)
    with monkeypatch.context() as patch:
        patch.setattr(safety, "_MAX_TENSORS", 3)
        assert "its shards hold more than the 3 tensors that a model may have" in refusal(model)
    for number in range(20):
        (checkpoint / f"{number}.log").touch()
    monkeypatch.setattr(safety, "_MAX_FILES", 20)
    assert "files that a checkpoint may have" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("build", "changes", "line"),
    [
        ("GPT-2", {"n_layer": 500}, "n_layer is 500; by the weights it must be an integer from 1 to 128"),
        ("GPT-2", {"n_layer": 50_000}, "n_layer is 50000; it may be 1,024 at most"),
        ("GPT-2", {"n_layer": "2"}, "n_layer is '2'; by the weights"),
        ("GPT-2", {"n_embd": 10**6}, "n_embd is 1000000; by the weights it must be an integer from 1 to 64"),
        ("GPT-2", {"vocab_size": 10**7}, "vocab_size is 10000000; by the weights"),
        ("GPT-2", {"n_inner": 10**8}, "n_inner is 100000000, more than the 7,616 weights can hold"),
        ("GPT-2", {"n_positions": 10**9}, "n_positions is 1000000000, more than the .* weights"),
        ("Llama", {"num_hidden_layers": -1}, "num_hidden_layers is -1; by the weights"),
        ("Llama", {"num_key_value_heads": 10**5, "head_dim": 1 << 20}, "num_key_value_heads is 100000, more than"),
        ("Llama", {"intermediate_size": [8, 10**8]}, "intermediate_size is 100000000, more than"),
        ("Llama", {"num_labels": 10**7}, "num_labels is 10000000; it may be 32,768 at most"),
        ("Llama", {"text_config": {"vocab_size": 10**7}}, "vocab_size is 10000000; by the weights"),
        ("Llama", {"auto_map": {"AutoTokenizer": ["a.A", None]}}, "needs code of its own"),
        ("tiny", {"n_layer": 2}, "n_layer is 2, the weights hold 1 layers"),
        ("int8", {"n_layer": 3}, "n_layer is 3, the weights hold 2 layers"),
        ("int8", {"n_embd": 10**6}, "n_embd is 1000000; by the weights"),
    ],
)
def test_sizes_of_other_models_and_layouts_are_refused(
    build: str, changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    GOOD[build](tmp_path)
    check_model_folder(tmp_path)
    edit("config.json", **changes)(tmp_path)
    assert re.search(line, refusal(tmp_path))


def test_an_empty_tensor_does_not_justify_a_size(tmp_path: Path) -> None:
    gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "vast": torch.empty(0, 1 << 40)}, tmp_path / "model.safetensors")
    edit("config.json", vocab_size=1 << 30)(tmp_path)
    assert "vocab_size is 1073741824; by the weights it must be an integer from 1 to 64" in refusal(tmp_path)


@pytest.mark.parametrize("name", PICKLES)
def test_weights_that_are_a_pickle_are_refused(name: str, model: Path) -> None:
    (model / name).write_bytes(b"x")
    check_model_folder(model)  # beside safetensors nothing opens it
    (model / "model.safetensors").unlink()
    assert refusal(model) == (
        f"{model}/{name}: its weights are a pickle, which can run code: store them as safetensors"
    )


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    assert "cannot be read" in refusal(tmp_path / "file")
    assert refusal(tmp_path).endswith("it holds no config.json")


# --- what passes


def ours(**changes: Any) -> Change:
    def build(folder: Path) -> None:
        dtype = changes.pop("dtype", torch.float32)
        GPTKitForCausalLM(GPTKitConfig(**{**SHAPE, **changes})).to(dtype).save_pretrained(folder)

    return build


def gpt2(folder: Path) -> None:
    sizes = {"vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    for name in ("pytorch_model.bin", "tf_model.h5", "training_args.bin"):  # as on the Hub, and as Trainer leaves it
        (folder / name).write_bytes(b"x")


def llama(**changes: Any) -> Change:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {**sizes, "vocab_size": 40, "intermediate_size": 40, "max_position_embeddings": 1 << 17, **changes}
    return lambda folder: LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder, max_shard_size="4KB")


def quantized(folder: Path) -> None:
    ours()(folder / "whole")
    method = torchao.quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    small = AutoModelForCausalLM.from_pretrained(folder / "whole", quantization_config=TorchAoConfig(method))
    small.save_pretrained(folder)


def headless(folder: Path) -> None:
    GPTKitModel(GPTKitConfig(**SHAPE)).save_pretrained(folder)


GOOD: dict[str, Change] = {
    "tiny": write_tiny_model,
    "with a chat template": lambda folder: write_tiny_model(folder, chat_template="{{ messages }}"),
    "sharded": lambda folder: GPTKitForCausalLM(GPTKitConfig(**SHAPE)).save_pretrained(folder, max_shard_size="4KB"),
    "tied": ours(),
    "not tied": ours(tie_word_embeddings=False),
    "without biases": ours(use_bias=False, n_inner=24),
    "sinusoidal": ours(position_embedding="sinusoidal", max_position_embeddings=1 << 16),
    "bfloat16": ours(dtype=torch.bfloat16),
    "headless": headless,
    "int8": quantized,
    "GPT-2": gpt2,
    "Llama": llama(),
    "Llama, tied": llama(tie_word_embeddings=True, head_dim=8),
}


@pytest.mark.parametrize("build", GOOD.values(), ids=GOOD)
def test_a_good_folder_passes_and_loads(build: Change, tmp_path: Path) -> None:
    build(tmp_path / "model")
    with watched() as read:
        check_model_folder(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        assert read[file.name] == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_adapters_and_checkpoints_pass(adapter: Path, checkpoint: Path, tiny: Path) -> None:
    for folder in (adapter, checkpoint):
        with watched():
            check_model_folder(folder)
    assert load_adapter(AutoModelForCausalLM.from_pretrained(tiny), adapter).peft_config["default"].r == 2
    # What each process writes of a model that is cut over them.
    (checkpoint / "state").mkdir()
    write_shapes(checkpoint / "state" / "shard-00000-model-00001-of-00002.safetensors", {"exp_avg.a": (2, 3)})
    check_model_folder(checkpoint)


def test_a_folder_of_fifty_gigabytes_passes_by_its_headers(tmp_path: Path) -> None:
    config = create_model_config("gpt3-13B")
    config.save_pretrained(tmp_path)
    write_shapes(tmp_path / "model.safetensors", stored_shapes(config))
    assert (tmp_path / "model.safetensors").stat().st_size > 50e9
    with watched() as read:
        check_model_folder(tmp_path)
    assert sum(read.values()) < 200_000


@pytest.mark.parametrize("seed", range(6))
def test_the_shapes_are_those_of_the_model(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    shape: dict[str, Any] = {
        "vocab_size": draw.randrange(5, 50),
        "n_layer": draw.randrange(1, 4),
        "n_head": 2,
        "n_embd": 2 * draw.randrange(3, 9),
        "n_inner": draw.randrange(4, 40),
        "max_position_embeddings": draw.randrange(4, 40),
        "use_bias": seed % 2 == 0,
        "tie_word_embeddings": seed < 2,
        "position_embedding": "learned" if seed % 3 else "sinusoidal",
    }
    if seed >= 4:
        shape |= {**MODERN, "num_key_value_heads": draw.randrange(1, 3), "head_dim": 2 * draw.randrange(1, 9)}
    config = GPTKitConfig(**shape)
    config.save_pretrained(tmp_path)
    shapes = dict(stored_shapes(config))
    file = tmp_path / "model.safetensors"
    write_shapes(file, {**shapes, "of_another_tool": (3,)})
    check_model_folder(tmp_path)
    for name in shapes:
        write_shapes(file, {other: shape for other, shape in shapes.items() if other != name})
        refusal(tmp_path)
        write_shapes(file, {**shapes, name: (shapes[name][0] + 1, *shapes[name][1:])})
        refusal(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_snapshot_passes_and_may_not_link_elsewhere(shared: bool, tiny: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(tiny.iterdir())):
        digest = f"{number:064x}"
        shutil.copy(file, blobs / digest)
        if shared:  # one store for all repositories, which the repository's own points to
            store = tmp_path / "hub" / "blobs" / digest[:2]
            store.mkdir(parents=True, exist_ok=True)
            (blobs / digest).rename(store / digest)
            (blobs / digest).symlink_to(Path("..", "..", "blobs", digest[:2], digest))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", digest))
    check_model_folder(snapshot)
    (tmp_path / "named").symlink_to(snapshot)
    check_model_folder(tmp_path / "named")
    AutoModelForCausalLM.from_pretrained(snapshot)
    shutil.copytree(repository, tmp_path / "hub" / "elsewhere", symlinks=True)
    assert "link out of its folder" in refusal(tmp_path / "hub" / "elsewhere" / "snapshots" / "0123abc")
    instead(link_out, "config.json")(snapshot)
    assert "link out of its folder" in refusal(snapshot)


# --- what nobody runs


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that no code in a folder may create."""
    mark = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Canary(mark)))
    mark.unlink()
    return mark


def plant(folder: Path, mark: Path) -> None:
    """Add files to a folder that create the mark if anything runs them."""
    for name in PICKLES:
        with (folder / name).open("wb") as file:
            torch.save({"w": Canary(mark)}, file)
    for name in ("configuration_gpt_kit", "modeling_gpt_kit", "tokenization_evil", "__init__", "torch", "generate"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')")


def test_no_loader_runs_files_of_a_good_folder(
    model: Path, adapter: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    for folder in (model, adapter):
        plant(folder, mark)
        check_model_folder(folder)
    for kind in (AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM, GPTKitForCausalLM, AutoProcessor):
        kind.from_pretrained(model)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    load_adapter(AutoModelForCausalLM.from_pretrained(model), adapter)
    edit("adapter_config.json", base_model_name_or_path=str(model))(adapter)
    AutoModelForCausalLM.from_pretrained(adapter)
    assert not mark.exists()


def test_a_resumed_run_runs_no_code_of_its_folder(tmp_path: Path, mark: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"The king sees {number} ships.\n" for number in range(80)))
    short: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "sample_steps": 0, "report_to": ["none"]}
    train(run_options(tmp_path / "whole", str(text), **short), stream=None)
    for step in (1, 2):
        folder = killed_copy(tmp_path / "whole", tmp_path / f"run-{step}", "step-00000004")
        newest = list_checkpoints(folder)[-1]
        check_model_folder(newest)
        plant(newest if step == 1 else folder, mark)
        if step == 1:
            manifest = json.loads((newest / "manifest.json").read_text())["step"]
            with_manifest(newest, manifest)
            assert "it is a pickle" in refusal(newest)
        with suppress(CheckpointError):
            train(run_options(folder, str(text), **short, resume=True), stream=None)
        assert not mark.exists()
