"""Updates by several processes, with DDP and with FSDP2, against those of one process; and what they communicate."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from ranks import run_ranks
from test_sharded_run import sharding
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_kit_hf import (
    AMPTrainer,
    GPTModel,
    OptimizerOptions,
    RunOptions,
    TextOptions,
    TrainingOptions,
    UsageError,
    create_model_config,
    create_optimizer,
    train,
)
from gpt_kit_hf.model.losses import Batch
from gpt_kit_hf.training.runtime.launch import check_backend, create_accelerator
from gpt_kit_hf.training.runtime.lost_processes import lost_process

STEPS, ROWS, PARTS, LENGTH, VOCABULARY = 4, 24, 3, 16, 61
HOWS = [("ddp", "adamw", "fp32"), ("ddp", "muon", "fp32"), ("fsdp2", "adamw", "fp32"), ("fsdp2", "muon", "fp32")]
BF16 = [("ddp", "adamw", "bf16"), ("fsdp2", "adamw", "bf16")]


class Communication(TorchDispatchMode):
    """Counts the collectives that this thread starts, by name, type and bytes of what is communicated."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[tuple[str, torch.dtype, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            tensors = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            name = func.__name__.split(".")[0].strip("_")
            self.calls[name, tensors[0].dtype, max(tensor.nbytes for tensor in tensors)] += 1
        return func(*args, **(kwargs or {}))


class Reads:
    """Counts how often values that a GPU would have computed are read, for each of which it is waited for."""

    def __init__(self) -> None:
        self.count = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Reads:
        for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
            self._patch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def _counted(self, read: Any) -> Any:
        def counted(tensor: Tensor, *arguments: Any) -> Any:
            self.count += tensor.is_floating_point()  # the integers of a batch are on the CPU
            return read(tensor, *arguments)

        return counted


def tiny_model() -> GPTModel:
    torch.manual_seed(1)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    return GPTModel(create_model_config("modern-xs", **shape))


def micro_batches(step: int, rank: int, world: int) -> list[Batch]:
    """Return a process's share of a global batch, of whose targets some rows have many and some few."""
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 4, (ROWS, LENGTH + 1), generator=drawn)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=drawn) < torch.linspace(0, 0.9, ROWS)[:, None]] = -100
    shares = zip(ids[:, :-1].chunk(world)[rank].chunk(PARTS), targets.chunk(world)[rank].chunk(PARTS), strict=True)
    return [Batch(*share) for share in shares]


def connected(how: str) -> Accelerator:
    """Return a new Accelerator of the process, which divides models by DDP or FSDP2."""
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = create_accelerator(use_cpu=True)
    return sharding(accelerator) if how == "fsdp2" else accelerator


def updated(rank: int, world: int, how: str, optimizer: str, precision: str) -> dict[str, Any]:
    """Make some updates; return their reports, what the last one communicated, and the weights."""
    model = tiny_model()
    chosen = create_optimizer(model, OptimizerOptions(optimizer=optimizer, learning_rate=1e-2))  # type: ignore[arg-type]
    trainer = AMPTrainer(model, chosen, mixed_precision=precision, accelerator=connected(how))
    sharded: set[bool] = set()
    storages: set[int] = set()

    def look_at_gradients(index: int) -> None:
        gradients = [parameter.grad for parameter in trainer.model.parameters() if index]
        sharded.update(isinstance(gradient, DTensor) for gradient in gradients)
        if index == 1 and how == "ddp":
            storages.clear()
            storages.update(gradient.untyped_storage().data_ptr() for gradient in gradients if gradient is not None)

    reports, tokens = [], None
    for step in range(STEPS):
        batches = micro_batches(step, rank, world)
        following = trainer.count_trained_tokens(micro_batches(step + 1, rank, world))
        with Reads() as reads, Communication() as communication:
            report = trainer.update(
                batches,
                trained_tokens=tokens,
                before_micro_batch=look_at_gradients,
                meanwhile=lambda rank=rank, following=following: [rank, following],
            )
        reports.append(report)
        tokens = report.sums[1]
    weights = {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()
        for name, weight in model.named_parameters()
    }
    counts = {"calls": communication.calls, "reads": reads.count, "storages": len(storages)}
    return {"reports": reports, "sharded": sharded, "weights": weights, **counts}


def updated_in_each_way(rank: int, world: int, hows: list[tuple[str, str, str]]) -> dict[Any, Any]:
    return {how: updated(rank, world, *how) for how in hows}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(updated_in_each_way, 2, tmp_path_factory.mktemp("two"), HOWS + BF16)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {optimizer: updated(0, 1, "alone", optimizer, "fp32") for optimizer in ("adamw", "muon")}


def assert_equal(found: list[Any], alone: dict[str, Any], hows: list[tuple[str, str, str]], tolerance: float) -> None:
    for how in hows:
        expected = alone[how[1]]["reports"]
        assert expected[0].loss - expected[-1].loss > 10 * tolerance  # it learns
        for rank in found:
            reports = rank[how]["reports"]
            assert [report.loss for report in reports] == pytest.approx([r.loss for r in expected], abs=tolerance), how
            norms = [report.grad_norm for report in reports]
            assert norms == pytest.approx([report.grad_norm for report in expected], rel=10 * tolerance), how
            assert [report.trained_tokens for report in reports] == [report.trained_tokens for report in expected]
            assert [r.sums for r in reports] == [(sum(range(len(found))), r.sums[1]) for r in expected]


def test_two_processes_update_as_one(two: list[Any], alone: dict[str, Any]) -> None:
    assert_equal(two, alone, HOWS, 1e-5)
    assert_equal(two, alone, BF16, 1e-2)


@pytest.mark.parametrize("world", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_more_processes_update_as_one(world: int, alone: dict[str, Any], tmp_path: Path) -> None:
    assert_equal(run_ranks(updated_in_each_way, world, tmp_path, HOWS), alone, HOWS, 1e-5)


def test_replicas_stay_equal_to_the_bit(two: list[Any]) -> None:
    for how in HOWS + BF16:
        for name, weight in two[0][how]["weights"].items():
            assert torch.equal(weight, two[1][how]["weights"][name]), (how, name)


def test_gradients_stay_sharded_while_they_are_accumulated(two: list[Any]) -> None:
    """Whole gradients would take 4 bytes a parameter on each process, whatever their number."""
    for how in HOWS + BF16:
        assert two[0][how]["sharded"] == {how[0] == "fsdp2"}, how


def test_gradients_of_ddp_lie_in_the_buffer_that_is_communicated(two: list[Any]) -> None:
    assert {two[0][how]["storages"] for how in HOWS + BF16 if how[0] == "ddp"} == {1}  # of one bucket


def test_a_step_exchanges_one_small_tensor_besides_the_gradients(two: list[Any]) -> None:
    parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    for precision in ("fp32", "bf16"):
        # The gradients in one bucket; loss, the digest's place and the next step's tokens.
        assert two[0]["ddp", "adamw", precision]["calls"] == {
            ("allreduce", torch.float32, 4 * parameters): 1,
            ("allreduce", torch.float64, 8 * 3): 1,
        }
        small = [call for call in two[0]["fsdp2", "adamw", precision]["calls"] if call[0] == "allreduce"]
        assert small == [("allreduce", torch.float64, 8 * 3)]


def test_a_step_waits_for_the_device_once(two: list[Any], alone: dict[str, Any]) -> None:
    assert {how: two[0][how]["reads"] for how in HOWS + BF16} == dict.fromkeys(HOWS + BF16, 1)
    assert alone["adamw"]["reads"] == alone["muon"]["reads"] == 1


def test_fsdp2_communicates_weights_in_the_precision_and_gradients_in_fp32(two: list[Any]) -> None:
    sent: dict[tuple[str, str], dict[torch.dtype, int]] = {}
    for precision in ("fp32", "bf16"):
        for (name, dtype, size), count in two[0]["fsdp2", "adamw", precision]["calls"].items():
            kind = sent.setdefault((precision, name), {})
            kind[dtype] = kind.get(dtype, 0) + size * count
    whole = sent["fp32", "allgather_base"][torch.float32]
    assert sent["bf16", "allgather_base"] == {torch.bfloat16: whole // 2}
    assert sent["bf16", "reduce_scatter_base"] == sent["fp32", "reduce_scatter_base"]
    assert sent["fp32", "reduce_scatter_base"].keys() == {torch.float32}


# --- the time that a process waits for another


def wait_for_another(rank: int, world: int, folder: Path, port: int) -> str | None:
    """Let process 0 be busy until process 1 has given up waiting for it."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    create_accelerator(use_cpu=True, timeout=5.0)
    why = None
    while rank == 0 and not (folder / "gave-up").exists():
        time.sleep(0.05)
    if rank == 1:
        try:
            dist.barrier()
        except RuntimeError as error:
            why = lost_process(error)
        (folder / "gave-up").touch()
    dist.destroy_process_group()
    return why


def test_a_process_gives_up_waiting_after_the_timeout(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    [_, why] = run_ranks(wait_for_another, 2, tmp_path, tmp_path, port)
    assert why is not None
    assert why.startswith("another process of the run does not answer (")


# --- what is refused


OTHERS = [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP1 \(fsdp_version 1\)"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, r"FSDP1 \(fsdp_version 1\)"),
]


@pytest.mark.parametrize(("variables", "name"), OTHERS)
def test_a_launch_by_another_library_is_refused_before_anything_is_read(
    variables: dict[str, str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    training = TrainingOptions(output_dir=str(tmp_path / "run"), use_cpu=True)
    options = RunOptions(training=training, text=TextOptions(text_files=[str(tmp_path / "missing.txt")]))
    with pytest.raises(UsageError, match=f"^{name} is not supported: use FSDP2: accelerate launch --config_file "):
        train(options, stream=None)
    assert not (tmp_path / "run").exists()


def test_fsdp2_on_a_cpu_is_refused(tmp_path: Path) -> None:
    """Accelerate would take DDP, without a word."""
    [why, other] = run_ranks(refused_on_a_cpu, 2, tmp_path)
    assert why == other == "FSDP2 shards a model over GPUs only: on CPUs, use examples/accelerate/cpu.yaml"


def refused_on_a_cpu(rank: int, world: int) -> str:
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    try:
        create_accelerator(use_cpu=True)
    except UsageError as error:
        return str(error)
    return "not refused"


def test_an_accelerator_that_divides_otherwise_is_refused() -> None:
    given: dict[str, Any] = {"distributed_type": DistributedType.FSDP, "is_fsdp2": False, "parallelism_config": None}
    with pytest.raises(UsageError, match="FSDP1"):
        check_backend(SimpleNamespace(**given))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="MEGATRON_LM is not supported"):
        check_backend(SimpleNamespace(**given | {"distributed_type": DistributedType.MEGATRON_LM}))  # type: ignore[arg-type]
    mesh = ParallelismConfig(dp_shard_size=2, tp_size=2)
    given |= {"is_fsdp2": True, "parallelism_config": mesh}
    with pytest.raises(UsageError, match=r"parallelism are not supported \(tp in parallelism_config\)"):
        check_backend(SimpleNamespace(**given))  # type: ignore[arg-type]
