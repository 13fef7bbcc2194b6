"""A model and its optimizer sharded over two processes, compared with one process that holds all."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hand_written_models import is_tied
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM
from gpt_kit_hf.errors import CheckpointError
from gpt_kit_hf.storage.atomic_files import load_tensors, save_tensors
from gpt_kit_hf.storage.digests import FileDigest, digest_of
from gpt_kit_hf.training.state import sharded_state
from gpt_kit_hf.training.state.host_copies import HostCopies
from gpt_kit_hf.training.state.sharded_saves import ShardedSaves
from gpt_kit_hf.training.state.sharded_state import (
    full_state,
    local_part,
    restore_sharded_optimizer,
    sharded_optimizer,
    unsharded_model,
    write_sharded_optimizer,
)

ROOT = Path(__file__).resolve().parents[3]
RANKS = 2
# The vocabulary is not divisible by two. The last case is sharded by Accelerate, the others by hand.
CASES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "by accelerate": {"tie_word_embeddings": True, "use_bias": False},
}
BATCH, LENGTH, VOCABULARY = 4, 12, 61
STEPS, MORE = 3, 2


# --- shared by the test and the ranks


def tiny_model(seed: int, **overrides: Any) -> GPTKitForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "max_position_embeddings": LENGTH}
    return GPTKitForCausalLM(GPTKitConfig(**shape, **overrides))


def optimizer_for(model: nn.Module, lr: float = 0.01) -> AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.8, 0.9))


def train(model: nn.Module, optimizer: Optimizer, steps: range, rank: int = 0, world: int = 1) -> list[float]:
    """Train on this process's share of each step's batch; return the losses of whole batches."""
    losses = []
    for step in steps:
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
        own = ids.chunk(world)[rank].to(next(model.parameters()).device)
        loss = model(own, labels=own).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gathered(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return all weights and all of the optimizer's tensors, each whole."""
    model.state_dict()  # puts the shards back
    found = {name: whole(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{key} of {name}"] = whole(value)
    return found


def write_sharded_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, FileDigest]:
    """Write the optimizer's shards, and the whole weights beside them, as a checkpoint does."""
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_tensors(folder.with_name(f"{folder.name}-weights"), weights)
    return write_sharded_optimizer(folder, sharded_optimizer(model, optimizer))


def restore_sharded_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read what `write_sharded_state` wrote."""
    weights = load_tensors(folder.with_name(f"{folder.name}-weights"))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            value = weights[name]
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(value)
    restore_sharded_optimizer(folder, model, optimizer)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


class Small(nn.Module):
    """Has fewer elements than there are processes, so some hold none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("offset", torch.zeros(1))
        self.offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.offset
        return out


# --- a rank


def with_fsdp2(accelerator: Accelerator) -> Accelerator:
    """Make Accelerate shard a model on a CPU, which it does on GPUs only."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    # Both, or the first is put back.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def prepared(accelerator: Accelerator, model: nn.Module, lr: float) -> tuple[Any, Any]:
    model, wrapped = accelerator.prepare(model, optimizer_for(model, lr))
    return model, wrapped.optimizer


def sharded_model(case: str, seed: int, lr: float) -> tuple[Any, Any]:
    """Return a model sharded over the processes, and its optimizer."""
    model: Any = tiny_model(seed, **CASES[case])
    if case == "by accelerate":
        return prepared(with_fsdp2(Accelerator(cpu=True)), model, lr)
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, optimizer_for(model, lr)


def refusal(call: Callable[..., object], *arguments: object) -> str:
    try:
        call(*arguments)
    except CheckpointError as error:
        return str(error)
    return "nothing was refused"


def run_case(case: str, folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, optimizer = sharded_model(case, 0, 0.01)
    found["losses"] = train(model, optimizer, range(STEPS), rank, RANKS)
    with torch.no_grad():  # which leaves parts of the model gathered
        model(torch.zeros(1, LENGTH, dtype=torch.long))
    assert any(not isinstance(parameter, DTensor) for parameter in model.parameters())
    hashed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_state, "digest_of", lambda path: hashed.append(path.name) or digest_of(path))
        digests = write_sharded_state(folder / "sharded", model, optimizer)
    found["hashed here"], found["digests"] = hashed, {name: each.sha256 for name, each in digests.items()}
    found["gathered"], found["options"] = gathered(model, optimizer), options(optimizer)
    found["shares"] = {name: list(p.to_local().shape) for name, p in model.named_parameters()}
    state = full_state(model)
    found["full"] = list(state)
    if rank == 0:
        unsharded_model(model).save_pretrained(folder / "saved", state_dict=state)

    found["losses"] += train(model, optimizer, range(STEPS, STEPS + MORE), rank, RANKS)
    found["later"] = gathered(model, optimizer)
    again, other = sharded_model(case, 1, 0.5)
    restore_sharded_state(folder / "sharded", again, other)
    found["losses again"] = train(again, other, range(STEPS, STEPS + MORE), rank, RANKS)
    found["later again"] = gathered(again, other)

    alone, other = sharded_model(case, 1, 0.5)
    restore_sharded_state(folder / "alone", alone, other)
    found["from one"] = gathered(alone, other)
    return found


def run_failures(folder: Path, rank: int) -> dict[str, str]:
    """Make one process fail, or all; return the error messages of this one."""
    captured: dict[str, str] = {}
    model, optimizer = sharded_model("tied", 0, 0.01)
    train(model, optimizer, range(1), rank, RANKS)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:

            def full_disk(*arguments: object, **keywords: object) -> bytes:
                raise OSError(28, "No space left on device")

            patch.setattr("safetensors.torch.save", full_disk)
        captured["full disk"] = refusal(write_sharded_state, folder / "full", model, optimizer)
    captured["a folder for each"] = refusal(write_sharded_state, folder / f"of process {rank}", model, optimizer)
    write_sharded_state(folder / "cut short", model, optimizer)
    if rank == 0:
        min((folder / "cut short").glob("shard-00002-*")).unlink()
    dist.barrier()
    captured["a shard is missing"] = refusal(restore_sharded_state, folder / "cut short", model, optimizer)
    optimizer.state[next(iter(optimizer.state))]["rows"] = torch.zeros(3)
    captured["other sharding"] = refusal(write_sharded_state, folder / "odd", model, optimizer)
    return captured


def run_background(folder: Path, rank: int) -> dict[str, Any]:
    """Copy the optimizer's state as from a GPU, and write it from threads while the training goes on."""
    model, optimizer = sharded_model("tied", 0, 0.01)
    train(model, optimizer, range(STEPS), rank, RANKS)
    then = gathered(model, optimizer)
    saves, copies = ShardedSaves(), HostCopies(torch.device("xpu"), refuse_words)
    buffers: list[dict[str, int]] = []
    for name in ("first", "second"):
        state = sharded_optimizer(model, optimizer)
        tensors = copies.copied(state.tensors)
        assert tensors is not None
        assert saves.all_agree(True)
        assert not saves.all_agree(rank == 0)
        buffers.append({label: local_part(tensor).data_ptr() for label, tensor in tensors.items()})
        assert not {local_part(tensor).data_ptr() for tensor in state.tensors.values()} & {*buffers[-1].values()} - {0}
        copied = replace(state, tensors=tensors)

        def lead(folder: Path = folder / name, copied: Any = copied) -> None:
            saves.lead(folder, copied)
            saves.end(True)

        thread = threading.Thread(target=lead if rank == 0 else partial(saves.follow, copied))
        thread.start()
        losses = train(model, optimizer, range(STEPS, STEPS + MORE), rank, RANKS)
        thread.join()
        if name == "first":
            again, other = sharded_model("tied", 0, 0.01)
            train(again, other, range(STEPS), rank, RANKS)
            restore_sharded_optimizer(folder / name, again, other)
            assert_equal(gathered(again, other), then)
            assert train(again, other, range(STEPS, STEPS + MORE), rank, RANKS) == losses
    assert buffers[0] == buffers[1]
    return {"local host": saves.on_this_host}


def refuse_words(line: str) -> None:
    raise AssertionError(line)


def run_small(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Small()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = optimizer_for(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    write_sharded_state(folder, model, optimizer)
    bias: Any = model.linear.bias
    state = full_state(model)
    assert all(tensor.data_ptr() != model.offset.data_ptr() for tensor in state.values())
    return {"gathered": gathered(model, optimizer), "elements here": bias.to_local().numel()}


def run_rank(folder: Path) -> None:
    """Run everything that needs two processes, and write the results to the folder."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found: dict[str, Any] = {case: run_case(case, folder / case, rank) for case in CASES}
        found["failures"] = run_failures(folder, rank)
        found["small"] = run_small(folder / "small")
        found["background"] = run_background(folder, rank)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for all ranks; if one fails, show its log at once, as the others would wait for it."""
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in started):
        assert time.monotonic() < deadline
        for rank, process in enumerate(started):
            assert not process.poll(), (folder / f"rank{rank}.log").read_text()
        time.sleep(0.1)
    assert [process.poll() for process in started] == [0] * RANKS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of two ranks, which have ended."""
    folder = tmp_path_factory.mktemp("ranks")
    for case, overrides in CASES.items():
        (folder / case).mkdir()
        model = tiny_model(2, **overrides)
        optimizer = optimizer_for(model)
        train(model, optimizer, range(1))
        write_sharded_state(folder / case / "alone", model, optimizer)
        torch.save(gathered(model, optimizer), folder / case / "alone.pt")
    here = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    here |= {"WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = []
    try:
        for rank in range(RANKS):
            with (folder / f"rank{rank}.log").open("w") as log:
                env = {**here, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, __file__, str(folder)]
                started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        wait_for(started, folder)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return folder


# --- the tests


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def both_ranks(ranks: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(ranks / f"rank{rank}.pt")[case] for rank in range(RANKS)]


def test_two_processes_train_a_sharded_model_as_one_process_does(case: str, ranks: Path) -> None:
    model = tiny_model(0, **CASES[case])
    optimizer = optimizer_for(model)
    losses = train(model, optimizer, range(STEPS + MORE))
    expected = gathered(model, optimizer)
    for found in both_ranks(ranks, case):
        assert found["losses"] == pytest.approx(losses, abs=1e-5)
        assert found["later"].keys() == expected.keys()
        assert sum(shape[0] for shape in found["shares"].values()) < sum(p.shape[0] for p in model.parameters())
    assert max(abs(losses[0] - loss) for loss in losses[1:]) > 1e-3  # it learns, or nothing was compared


def test_one_process_restores_what_two_wrote(case: str, ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a pickle was read")

    expected = both_ranks(ranks, case)[0]
    model = tiny_model(7, **CASES[case])
    optimizer = optimizer_for(model, lr=0.5)
    with monkeypatch.context() as patch:
        for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
            patch.setattr(module, name, refuse)
        restore_sharded_state(ranks / case / "sharded", model, optimizer)
    assert_equal(gathered(model, optimizer), expected["gathered"])
    assert options(optimizer) == expected["options"]
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert is_tied(model) == model.config.tie_word_embeddings
    # And it trains on as they did, up to rounding.
    losses = train(model, optimizer, range(STEPS, STEPS + MORE))
    assert losses == pytest.approx(expected["losses"][STEPS:], abs=1e-5)


def test_two_processes_that_restore_continue_to_the_bit(case: str, ranks: Path) -> None:
    for found in both_ranks(ranks, case):
        assert found["losses again"] == found["losses"][STEPS:]
        assert_equal(found["later again"], found["later"])


def test_two_processes_restore_what_one_wrote(case: str, ranks: Path) -> None:
    expected = torch.load(ranks / case / "alone.pt")
    for found in both_ranks(ranks, case):
        assert_equal(found["from one"], expected)


def test_each_process_hashes_what_it_has_written(case: str, ranks: Path) -> None:
    found = both_ranks(ranks, case)
    written = {path.name: digest_of(path).sha256 for path in (ranks / case / "sharded").glob("*.safetensors")}
    assert [each["digests"] for each in found] == [written, written]
    assert {each["hashed here"][0][:12] for each in found} == {"shard-00001-", "shard-00002-"}
    assert sorted(found[0]["hashed here"] + found[1]["hashed here"]) == sorted(written)


def test_threads_write_copies_while_the_processes_train(ranks: Path) -> None:
    assert both_ranks(ranks, "background") == [{"local host": RANKS}] * RANKS


def test_the_folder_holds_tensors_and_json_only(case: str, ranks: Path) -> None:
    files = sorted((ranks / case / "sharded").iterdir())
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert [path.name for path in files if path not in tensors] == ["optimizer.json"]
    held: dict[str, int] = {}
    for path in tensors:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                held[name] = held.get(name, 0) + file.get_tensor(name).numel()
    expected = both_ranks(ranks, case)[0]["gathered"]
    # Each element of the optimizer's state once, also of what both processes have; the weights are elsewhere.
    assert held == {
        ".".join(name.split(" of ")): tensor.numel() for name, tensor in expected.items() if " of " in name
    }
    for shard in ("shard-00001-", "shard-00002-"):
        share = sum(path.stat().st_size for path in tensors if path.name.startswith(shard))
        assert share > 0.35 * sum(path.stat().st_size for path in tensors)
    assert json.loads((ranks / case / "sharded/optimizer.json").read_text()).keys() == {"groups", "parameters"}


def test_the_first_process_has_the_whole_model_to_publish(case: str, ranks: Path, tmp_path: Path) -> None:
    first, second = both_ranks(ranks, case)
    assert second["full"] == []
    model = AutoModelForCausalLM.from_pretrained(ranks / case / "saved")
    assert first["full"] == list(model.state_dict())
    assert is_tied(model) == CASES[case].get("tie_word_embeddings", True)
    weights = {name: tensor for name, tensor in first["gathered"].items() if " of " not in name}
    assert_equal({name: parameter.detach() for name, parameter in model.named_parameters()}, weights)
    # Byte for byte what a model that was never cut writes, the files of its code among it.
    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (ranks / case / "saved").iterdir())
    for name in names:
        assert (ranks / case / "saved" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_failure_in_one_process_is_an_error_in_all(ranks: Path) -> None:
    first, second = both_ranks(ranks, "failures")
    assert second == {key: text.replace("of process 0 was", "of process 1 was") for key, text in first.items()}
    assert first["full disk"].endswith("was not written: process 1: OSError: [Errno 28] No space left on device")
    assert " was not written: process 0: shards of other processes are missing here: " in first["a folder for each"]
    assert "embed_tokens.weight does not have the recorded dtype and shape" in first["a shard is missing"]
    odd = "optimizer state rows.model.embed_tokens.weight is not sharded as its parameter is and cannot be stored"
    assert first["other sharding"] == f"the optimizer was not saved: process 0: {odd}"


def test_a_process_may_hold_nothing_of_a_tensor(ranks: Path) -> None:
    found = both_ranks(ranks, "small")
    assert sorted(rank["elements here"] for rank in found) == [0, 1]
    model = Small()
    optimizer = optimizer_for(model)
    restore_sharded_state(ranks / "small", model, optimizer)
    assert_equal(gathered(model, optimizer), found[0]["gathered"])


def test_dtypes_are_restored(tmp_path: Path) -> None:
    model = Small().to(torch.bfloat16)
    optimizer = optimizer_for(model)
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    # As mixed precision has it: float32 moments of a bfloat16 weight.
    state = optimizer.state[model.linear.weight]
    state["exp_avg"] = torch.full((1, 3), 1 / 3)
    write_sharded_state(tmp_path / "state", model, optimizer)
    again = Small().to(torch.bfloat16)
    other = optimizer_for(again)
    restore_sharded_state(tmp_path / "state", again, other)
    assert other.state[again.linear.weight]["exp_avg"].dtype == torch.float32
    assert_equal(gathered(again, other), gathered(model, optimizer))


def rename_weight(folder: Path) -> tuple[nn.Module, str]:
    model = Small()
    model.other = model.linear
    del model.linear
    return model, r"linear.bias belongs to no parameter of the model"


def make_other_shape(folder: Path) -> tuple[nn.Module, str]:
    model = Small()
    model.linear = nn.Linear(4, 1)
    return model, r"linear.weight has shape \[1, 4\], in the checkpoint \[1, 3\]"


def delete_moments(folder: Path) -> tuple[nn.Module, str]:
    max(folder.glob("*.safetensors")).unlink()
    return Small(), "optimizer state step.linear.weight is missing"


def delete_optimizer(folder: Path) -> tuple[nn.Module, str]:
    (folder / "optimizer.json").unlink()
    return Small(), "optimizer.json cannot be read"


def tear_shard(folder: Path) -> tuple[nn.Module, str]:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    return Small(), "SafetensorError"


def forget_step(folder: Path) -> tuple[nn.Module, str]:
    state = json.loads((folder / "optimizer.json").read_text())
    del state["parameters"]["linear.bias"]["state"]["step"]
    (folder / "optimizer.json").write_text(json.dumps(state))
    return Small(), "step.linear.bias belongs to no parameter"


DAMAGES = [
    rename_weight,
    make_other_shape,
    delete_moments,
    delete_optimizer,
    tear_shard,
    forget_step,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_does_not_fit_fails(damage: Callable[[Path], tuple[nn.Module, str]], tmp_path: Path) -> None:
    model = Small()
    optimizer = optimizer_for(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    write_sharded_state(tmp_path / "state", model, optimizer)
    other, message = damage(tmp_path / "state")
    with pytest.raises(CheckpointError, match=message):
        restore_sharded_optimizer(tmp_path / "state", other, optimizer_for(other))


def test_shards_of_an_earlier_version_hold_the_weights_too(tmp_path: Path) -> None:
    model = Small()
    optimizer = optimizer_for(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    write_sharded_state(tmp_path / "state", model, optimizer)
    weights = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
    save_tensors(tmp_path / "state" / "shard-00001-model-00004-of-00004.safetensors", weights)
    other = optimizer_for(model)
    restore_sharded_optimizer(tmp_path / "state", model, other)
    assert_equal(gathered(model, other), gathered(model, optimizer))


def test_an_optimizer_without_a_step_is_restored_without_state(tmp_path: Path) -> None:
    model = Small()
    write_sharded_state(tmp_path / "state", model, optimizer_for(model))
    again = Small()
    optimizer = optimizer_for(again)
    restore_sharded_state(tmp_path / "state", again, optimizer)
    assert not optimizer.state
    assert torch.equal(again.linear.weight, model.linear.weight)


# --- a launch by Accelerate


def run_accelerated(accelerator: Accelerator, folder: Path) -> None:
    """Be a process of a launch: train, write, restore, go on; leave the losses and the model in the folder."""
    rank, world = accelerator.process_index, accelerator.num_processes
    model, optimizer = prepared(accelerator, tiny_model(0), 0.01)
    losses = train(model, optimizer, range(STEPS), rank, world)
    write_sharded_state(folder / "sharded", model, optimizer)
    state = full_state(model)
    if accelerator.is_main_process:
        unsharded_model(model).save_pretrained(folder / "saved", state_dict=state)
    again, other = prepared(accelerator, tiny_model(1), 0.5)
    restore_sharded_state(folder / "sharded", again, other)
    later = range(STEPS, STEPS + MORE)
    losses += train(again, other, later, rank, world)
    assert train(model, optimizer, later, rank, world) == losses[STEPS:]
    if accelerator.is_main_process:
        (folder / "losses.json").write_text(json.dumps(losses))
    accelerator.end_training()


@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="Accelerate cuts a model over GPUs only, two at least")
def test_the_launch_that_the_example_configures(tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file", "examples/accelerate/fsdp2.yaml"]
    command = [sys.executable, *launch, __file__, str(tmp_path), "--accelerate"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    model = tiny_model(0)
    losses = train(model, optimizer_for(model), range(STEPS + MORE))
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, abs=1e-4)
    restored = tiny_model(2)
    restore_sharded_state(tmp_path / "sharded", restored, optimizer_for(restored))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_equal(dict(restored.named_parameters()), dict(saved.named_parameters()))


if __name__ == "__main__":
    if "--accelerate" in sys.argv:
        run_accelerated(Accelerator(), Path(sys.argv[1]))
    else:
        run_rank(Path(sys.argv[1]))
