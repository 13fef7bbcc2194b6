"""Connects the processes of a launch, checks what was asked for, finds the launcher, and ends the processes."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from gpt_kit_hf.errors import UsageError

_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_ACCELERATE = ("accelerate", "accelerate.commands.accelerate_cli")
_ACCELERATE_LAUNCH = ("accelerate-launch", "accelerate.commands.launch")

_FSDP2 = "use FSDP2: accelerate launch --config_file examples/accelerate/fsdp2.yaml ..."

_destroyed_groups: list[object] = []


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """The parent process, if it is torchrun or `accelerate launch`: `arguments` are those behind its name."""

    pid: int
    is_torchrun: bool
    arguments: list[str]
    folder: Path


def create_accelerator(*, use_cpu: bool = False, timeout: float = 1800.0) -> Accelerator:
    """Return the Accelerator of a run, which connects its processes.

    `timeout` is the time in seconds after which a process gives up waiting for another one. Raises
    UsageError for a launch with DeepSpeed, Megatron-LM or FSDP1, and for one that divides anything but the batch.
    """
    _check_environment()
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="no",  # AMPTrainer does it
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
            # The gradients lie in the buffers that are communicated, which saves a copy of them.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    check_backend(accelerator)
    shared = accelerator.num_processes > 1
    if shared and parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        # Accelerate takes DDP then, without a word.
        raise UsageError("FSDP2 shards a model over GPUs only: on CPUs, use examples/accelerate/cpu.yaml")
    return accelerator


def _check_environment() -> None:
    """Refuse what Accelerate would fail to import, and what it would ignore on a CPU."""
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if parse_flag_from_env(variable):
            raise UsageError(f"{name} is not supported: {_FSDP2}")
    # Accelerate's default version is 1.
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(f"FSDP1 (fsdp_version 1) is not supported: {_FSDP2}")


def check_backend(accelerator: Accelerator) -> None:
    """Raise UsageError if an Accelerator does not divide the batch, and only that, over processes by DDP or FSDP2."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(f"{kind.value} is not supported: {_FSDP2}")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError(f"FSDP1 (fsdp_version 1) is not supported: {_FSDP2}")
    parallel = accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise UsageError(
            f"tensor, context and sequence parallelism are not supported ({', '.join(parallel.non_dp_dim_names)} in "
            "parallelism_config): each process must have its own part of the batch"
        )


def end_processes(accelerator: Accelerator) -> None:
    """Destroy the process group."""
    if accelerator.num_processes > 1:
        # DDP's reducer owns the process group, too. As its last owner it would run the group's destructor with
        # Python's lock held, which gloo's thread may need at that time to free a tensor: a deadlock
        # (pytorch/pytorch#56297). This reference is the last one; its destructor releases Python's lock.
        _destroyed_groups.append(dist.group.WORLD)
    accelerator.end_training()


def launcher_pid() -> int | None:
    """Return the pid of the parent process if that is torchrun or `accelerate launch`, else None.

    While the launcher lives, `os.getppid()` is this number. The parent's command line decides, not environment
    variables: a shell may have kept those of an earlier launch.
    """
    launcher = _find_launcher()
    return None if launcher is None else launcher.pid


def check_launch(accelerator: Accelerator) -> None:
    """Raise UsageError if the launcher was asked for several processes and Accelerate found only one.

    Either each process would train the whole run by itself, or only one was started, as
    `accelerate launch --cpu --num_processes 2` does without a warning.
    """
    launcher = _find_launcher()
    if launcher is None or accelerator.num_processes > 1:
        return
    asked = int(os.environ.get("WORLD_SIZE", "1")) if launcher.is_torchrun else _accelerate_processes(launcher)
    if asked > 1:
        commands = _commands(asked, accelerator.device.type)
        raise UsageError(f"{asked} processes were asked for, but 1 was found: launch with {commands}")


def _commands(processes: int, device: str) -> str:
    """Return the commands that start this number of processes on a type of device."""
    script = shlex.quote(sys.argv[0])
    several = f"accelerate launch --multi_gpu --num_processes {processes} {script} ..."
    if device not in ("cpu", "mps"):
        return f"`{several}`, which gives each process a GPU"
    return f"`torchrun --nproc_per_node {processes} {script} ... --use_cpu` or `{several} --use_cpu`"


def _find_launcher() -> _Launcher | None:
    try:
        parent = psutil.Process(os.getppid())
        program, arguments = _program(parent.cmdline())
        folder = Path(parent.cwd())
    except psutil.Error:
        return None
    if program in _ACCELERATE and arguments[:1] == ["launch"]:
        program, arguments = _ACCELERATE_LAUNCH[0], arguments[1:]
    if program not in _TORCHRUN + _ACCELERATE_LAUNCH:
        return None
    return _Launcher(pid=parent.pid, is_torchrun=program in _TORCHRUN, arguments=arguments, folder=folder)


def _program(command: Sequence[str]) -> tuple[str, list[str]]:
    """Return what a command line runs, as the name of a file or of a Python module, and its arguments."""
    words = iter(command)
    name = Path(next(words, "")).name.removesuffix(".exe")
    if not re.match("python|pypy", name, re.IGNORECASE):
        return name, list(words)
    for word in words:
        if module := re.fullmatch(r"-[bBdEiIOPqsSuvx]*m(.*)", word):
            return module[1] or next(words, ""), list(words)
        if word.startswith("-c"):
            break
        if word in ("-W", "-X"):
            next(words, None)
        elif not word.startswith("-"):
            return Path(word).name.removesuffix(".exe"), list(words)
    return name, list(words)


def _accelerate_processes(launcher: _Launcher) -> int:
    """Return the number of processes in the launcher's arguments, or in the configuration that it read, or 1."""
    # Not at the top: only a process of `accelerate launch` needs Accelerate's command line.
    from accelerate.commands.config.config_args import ClusterConfig, default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args(launcher.arguments)
    if asked.num_processes is not None:
        return int(asked.num_processes)
    if asked.config_file is None and asked.cpu:
        return 1  # Accelerate does not read its default configuration then
    path = launcher.folder / (asked.config_file or default_config_file)
    if not path.is_file():
        return 1
    config = load_config_from_file(str(path))
    return int(config.num_processes) if isinstance(config, ClusterConfig) else 1
