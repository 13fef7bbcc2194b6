"""Copies of the state for a background save: where they lie, what they take, and what happens without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import staging
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM
from gpt_kit_hf.training.state import host_copies
from gpt_kit_hf.training.state.host_copies import HostCopies

OTHER_DEVICE = torch.device("xpu")  # the code for a device that is not the CPU, without pinned memory


class Allocations(TorchDispatchMode):
    """Notes what makes new memory where a tensor lies: operations with such a result, and copies of its storage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        copy_of = torch.UntypedStorage.__deepcopy__

        def deepcopy(storage: Any, memo: Any) -> Any:
            self.found.append("deepcopy")
            return copy_of(storage, memo)

        monkeypatch.setattr(torch.UntypedStorage, "__deepcopy__", deepcopy)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(result, Tensor) and result.numel() > 1 and result.untyped_storage().data_ptr() not in given:
            self.found.append(str(func))
        return result


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "max_position_embeddings": 12}
    model = GPTKitForCausalLM(GPTKitConfig(**shape, tie_word_embeddings=True))
    return {**model.state_dict(), "step": torch.tensor(3.0)}


def assert_copies(copies: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    assert copies.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor)
        assert copies[name].data_ptr() != tensor.data_ptr()
    assert copies["lm_head.weight"].data_ptr() == copies["model.embed_tokens.weight"].data_ptr()


def test_nothing_is_allocated_on_the_device_and_buffers_are_used_again(
    tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = HostCopies(OTHER_DEVICE, no_word)
    with Allocations(monkeypatch) as allocations:
        first = copies.copied(tensors)
    assert first is not None
    assert allocations.found == []
    assert_copies(first, tensors)
    before = {name: tensor.clone() for name, tensor in first.items()}
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    for tensor in tensors.values():
        tensor.add_(1.0)
    assert all(torch.equal(first[name], tensor) for name, tensor in before.items())
    second = copies.copied(tensors)
    assert second is not None
    assert_copies(second, tensors)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places


def test_the_cpu_copies_to_memory_that_is_given_back(
    tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = HostCopies(torch.device("cpu"), no_word)
    with Allocations(monkeypatch) as allocations:
        first, second = copies.copied(tensors), copies.copied(tensors)
    assert first is not None
    assert second is not None
    assert len(allocations.found) > 20  # what the test of another device looks for, here from deepcopy
    with Allocations(monkeypatch) as allocations:
        tensors["model.norm.weight"].clone()
    assert allocations.found == ["aten.clone.default"]
    assert_copies(first, tensors)
    assert first["model.norm.weight"].data_ptr() != second["model.norm.weight"].data_ptr()


def no_word(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("xpu", False)])
def test_buffers_are_pinned_for_cuda(
    device: str, pinned: bool, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[staging.StagingOptions] = []

    class Stager:
        def __init__(self, options: staging.StagingOptions) -> None:
            asked.append(options)

        def stage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(state)

    monkeypatch.setattr(staging, "DefaultStager", Stager)
    copies = HostCopies(torch.device(device), no_word)
    assert copies.copied(tensors) == copies.copied(tensors) == tensors
    [options] = asked
    assert (options.use_pinned_memory, options.use_non_blocking_copy) == (pinned, pinned)
    assert not options.use_shared_memory
    assert not options.use_async_staging


def test_memory_decides_and_buffers_count_as_had(tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for name, tensor in tensors.items() if name != "lm_head.weight")  # tied: counted once
    lines: list[str] = []
    copies, shared = HostCopies(OTHER_DEVICE, lines.append), HostCopies(OTHER_DEVICE, lines.append, sharing=2)
    monkeypatch.setattr(host_copies, "available_memory", lambda: int(2.5 * size))
    assert copies.copied(tensors) is not None
    assert shared.copied(tensors) is None
    monkeypatch.setattr(host_copies, "available_memory", lambda: int(1.5 * size))  # the buffers are there
    assert copies.copied(tensors) is not None
    monkeypatch.setattr(host_copies, "available_memory", lambda: int(1.5 * size) - 1)
    assert copies.copied(tensors) is None
    assert copies.copied(tensors) is None
    assert len(lines) == 2  # once for each
    assert f"copies take {5 * size:,} bytes of host memory, {int(2.5 * size):,} are left" in lines[0]


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: out of memory\nmore", 2), MemoryError()], ids=["pinned", "plain"]
)
def test_a_copy_that_runs_out_of_memory_is_a_save_in_the_foreground(
    error: Exception, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def fail(self: HostCopies, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        raise error

    monkeypatch.setattr(HostCopies, "_staged", fail)
    assert HostCopies(OTHER_DEVICE, lines.append).copied(tensors) is None
    assert lines[0].startswith("note: checkpoints are written while training waits, for want of memory: ")
    monkeypatch.setattr(HostCopies, "_staged", lambda self, tensors: nn.Linear(3, 3)(torch.ones(2)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # another error is not hidden
        HostCopies(OTHER_DEVICE, lines.append).copied(tensors)
