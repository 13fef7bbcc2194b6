"""What the bits of a step depend on beside its numbers: the machine, the kernels and how they are chosen."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils.environment import get_driver_version
from transformers import PreTrainedModel

from gpt_kit_hf.errors import UsageError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # read by transformers; the library's kernels do not know torch's setting
# What must be equal for equal bits, on every device, and on a GPU in addition.
_FACTS = (
    *("processes", "micro_batch_size", "device", "precision", "compiled", "attention", "deterministic"),
    *("threads", "cpu_capability"),
)
_PACKAGES = ("torch", "gpt-kit-hf")
_GPU_FACTS = ("gpu", "driver")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch compute a step twice to the same bits inside, if `wanted`; enter it before CUDA is used.

    Attention, sums and indexing take deterministic kernels, cuBLAS a fixed workspace, and neither cuDNN nor Inductor
    chooses kernels by measuring them. torch raises a RuntimeError for an operation that has no deterministic kernel.
    Raises UsageError if cuBLAS may have been started without a fixed workspace.
    """
    if not wanted:
        yield
        return
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if started and _CUBLAS not in os.environ:
        raise UsageError(
            f"deterministic=true: this process has used CUDA before; set {_CUBLAS}=:4096:8 and start again"
        )
    import torch._inductor.config as inductor  # here, as only a run that asks for it needs it

    os.environ.setdefault(_CUBLAS, ":4096:8")
    os.environ.setdefault(_FLASH, "1")
    settings: list[tuple[Any, str, bool]] = [
        (torch.backends.cudnn, "benchmark", False),
        (inductor, "deterministic", True),
    ]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    set_before = [getattr(module, name) for module, name, _ in settings]
    torch.use_deterministic_algorithms(True)
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        for (module, name, _), value in zip(settings, set_before, strict=True):
            setattr(module, name, value)


def computing_facts(
    model: PreTrainedModel,
    device: torch.device,
    *,
    processes: int,
    micro_batch_size: int,
    precision: str,
    compiled: bool,
) -> dict[str, Any]:
    """Return what the bits of a run's steps depend on, as JSON; a fact that cannot be found out is None."""
    facts: dict[str, Any] = {
        "processes": processes,
        "micro_batch_size": micro_batch_size,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "compiled": compiled,
        "attention": model.config.get_text_config()._attn_implementation,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "driver": _driver()}
    return facts


def differing_facts(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each fact of `computing_facts`, and version, that differs, and one for the unknown.

    `then` is a session of run.json, which has the versions of torch and of this package among its `versions`.
    Sessions of earlier versions lack some of the facts.
    """
    before = {**then, **then["versions"]}
    after = {**now, **{package: version(package) for package in _PACKAGES}}
    names = [*_FACTS, *_PACKAGES, *(_GPU_FACTS if "gpu" in before or "gpu" in after else ())]
    unknown = [name for name in names if before.get(name) is None or after.get(name) is None]
    return [
        *(f"{n} was {before[n]}, is {after[n]}" for n in names if n not in unknown and before[n] != after[n]),
        *([f"not recorded: {', '.join(unknown)}"] if unknown else []),
    ]


def why_not_exact(now: Mapping[str, Any]) -> list[str]:
    """Return why a step that is computed twice under these facts may have other bits, in a line, or []."""
    kind = str(now["device"]).partition(":")[0]
    if kind == "cpu" or (kind == "cuda" and now["deterministic"]):
        return []
    if kind == "cuda":
        return ["a GPU adds in any order without deterministic=true"]
    return [f"{kind} promises no order of additions"]


def _driver() -> str | None:
    try:
        found: str = get_driver_version()
    except (OSError, subprocess.CalledProcessError):  # no nvidia-smi, as in some containers
        return None
    return found
