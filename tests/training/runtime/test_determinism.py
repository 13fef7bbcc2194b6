"""Deterministic algorithms, and the facts that the bits of a step depend on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from gpt_kit_hf import GPTKitConfig, GPTKitForCausalLM, __version__
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.training.runtime import determinism
from gpt_kit_hf.training.runtime.determinism import (
    computing_facts,
    deterministic_algorithms,
    differing_facts,
    why_not_exact,
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC")
    return monkeypatch


def test_everything_is_set_and_put_back(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        assert inductor.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.ones(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert not inductor.deterministic
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_process_that_has_used_cuda_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_initialized", lambda: True)
    with (
        pytest.raises(UsageError, match="this process has used CUDA before; set CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        deterministic_algorithms(True),
    ):
        pass
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own choice
    with deterministic_algorithms(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def facts(device: str, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> dict[str, Any]:
    """Return the facts of a small model as this machine, or one with an H100, would record them."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(determinism, "get_driver_version", lambda: "570.86.15")
    shape = {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "max_position_embeddings": 12}
    model = GPTKitForCausalLM(GPTKitConfig(**shape))
    found = computing_facts(
        model, torch.device(device), processes=1, micro_batch_size=4, precision="bf16", compiled=False
    )
    return {**found, **changed}


def recorded(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "versions": {"torch": torch.__version__, "gpt-kit-hf": __version__}}


def test_each_fact_of_a_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = facts("cuda", monkeypatch)
    assert differing_facts(recorded(now), now) == []
    others: dict[str, Any] = {"gpu": "NVIDIA A100", "driver": "560.1", "compiled": True, "deterministic": True}
    for name, value in others.items():
        assert differing_facts(recorded({**now, name: value}), now) == [f"{name} was {value}, is {now[name]}"]
    for package, current in recorded(now)["versions"].items():
        then = {**now, "versions": {**recorded(now)["versions"], package: "0.0.9"}}
        assert differing_facts(then, now) == [f"{package} was 0.0.9, is {current}"]
    old = {name: value for name, value in recorded(now).items() if name not in ("gpu", "driver", "cpu_capability")}
    assert differing_facts(old, now) == ["not recorded: cpu_capability, gpu, driver"]


def test_bits_are_promised_on_a_cpu_and_on_cuda_if_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_exact(facts("cpu", monkeypatch)) == []
    assert why_not_exact(facts("cuda", monkeypatch, deterministic=True)) == []
    assert why_not_exact(facts("cuda", monkeypatch)) == ["a GPU adds in any order without deterministic=true"]
    assert why_not_exact({**facts("cpu", monkeypatch), "device": "mps"}) == ["mps promises no order of additions"]


def test_a_driver_that_cannot_be_asked_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError("nvidia-smi")

    now = facts("cuda", monkeypatch)
    monkeypatch.setattr(determinism, "get_driver_version", missing)
    model = GPTKitForCausalLM(GPTKitConfig(vocab_size=61, n_embd=16, n_layer=1, n_head=2, max_position_embeddings=12))
    unknown = computing_facts(
        model, torch.device("cuda"), processes=1, micro_batch_size=4, precision="bf16", compiled=False
    )
    assert differing_facts(recorded(now), unknown) == ["not recorded: driver"]
