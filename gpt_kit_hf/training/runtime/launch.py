"""Whether the processes that a launch asked for are there, and which process launched this one."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from accelerate import Accelerator

from gpt_kit_hf.errors import UsageError

_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_ACCELERATE = ("accelerate", "accelerate.commands.accelerate_cli")
_ACCELERATE_LAUNCH = ("accelerate-launch", "accelerate.commands.launch")


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """The process that started this one, if it is a launcher: its command line behind its name, and its folder."""

    pid: int
    name: Literal["torchrun", "accelerate"]
    arguments: list[str]
    folder: Path


def end_processes(accelerator: Accelerator) -> None:
    """End what binds the processes of a launch together, and the trackers."""
    if accelerator.num_processes > 1:
        # gloo's thread frees the last collective's tensors under its lock, for which it needs Python's own. What owns
        # the group waits for gloo's lock with Python's in its hands: either one waits for ever if they meet
        # (pytorch/pytorch#56297). Asleep, this thread leaves the other time to come to its end.
        time.sleep(0.2)
    accelerator.end_training()


def launcher_pid() -> int | None:
    """Return the pid of the parent process if that is torchrun or `accelerate launch`, else None.

    While the launcher lives, `os.getppid()` is this number. Only the parent's command line counts: a shell keeps the
    variables of launches that are long over.
    """
    launcher = _find_launcher()
    return None if launcher is None else launcher.pid


def check_launch(accelerator: Accelerator) -> None:
    """Raise UsageError if the launcher was asked for several processes and Accelerate found only one.

    Each would train the whole run by itself, or only one was started: `accelerate launch --cpu --num_processes 2`
    starts one and says nothing.
    """
    launcher = _find_launcher()
    if launcher is None or accelerator.num_processes > 1:
        return
    asked = int(os.environ.get("WORLD_SIZE", "1")) if launcher.name == "torchrun" else _asked_of_accelerate(launcher)
    if asked > 1:
        commands = _commands(asked, accelerator.device.type)
        raise UsageError(f"{asked} processes were asked for, but 1 was found: launch with {commands}")


def _commands(processes: int, device: str) -> str:
    """Return the commands that start so many processes on a kind of device."""
    script = shlex.quote(sys.argv[0])
    several = f"accelerate launch --multi_gpu --num_processes {processes} {script} ..."
    if device not in ("cpu", "mps"):
        return f"`{several}`, which gives each process a GPU"
    return f"`torchrun --nproc_per_node {processes} {script} ... --use_cpu` or `{several} --use_cpu`"


# --- the parent process


def _find_launcher() -> _Launcher | None:
    try:
        parent = psutil.Process(os.getppid())
        program, arguments = _program(parent.cmdline())
        folder = Path(parent.cwd())
    except psutil.Error:
        return None
    if program in _TORCHRUN:
        return _Launcher(pid=parent.pid, name="torchrun", arguments=arguments, folder=folder)
    if program in _ACCELERATE and arguments[:1] == ["launch"]:
        return _Launcher(pid=parent.pid, name="accelerate", arguments=arguments[1:], folder=folder)
    if program in _ACCELERATE_LAUNCH:
        return _Launcher(pid=parent.pid, name="accelerate", arguments=arguments, folder=folder)
    return None


def _program(command: Sequence[str]) -> tuple[str, list[str]]:
    """Return what a command line runs, the name of a file or of a Python module, and the arguments behind it."""
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


# --- what `accelerate launch` was asked for


def _asked_of_accelerate(launcher: _Launcher) -> int:
    """Return the number of processes on the launcher's command line, or in the configuration that it read, or 1."""
    arguments = _before_script(launcher.arguments)
    named = _value(arguments, "num_processes")
    if named is not None:
        return int(named)
    # Not at the top: Accelerate's command line is needed by nobody else.
    from accelerate.commands.config.config_args import ClusterConfig, default_config_file, load_config_from_file

    file = _value(arguments, "config_file")
    if file is None and "--cpu" in arguments:
        return 1  # the default configuration is not read then
    path = launcher.folder / (default_config_file if file is None else file)
    if not path.is_file():
        return 1
    config = load_config_from_file(str(path))
    return int(config.num_processes) if isinstance(config, ClusterConfig) else 1


def _before_script(arguments: list[str]) -> list[str]:
    """Return a launcher's own arguments: the script and what is behind it is this process's command line, too."""
    same = 0
    for theirs, ours in zip(reversed(arguments), reversed(sys.orig_argv), strict=False):
        if theirs != ours:
            break
        same += 1
    return arguments[: len(arguments) - same]


def _value(arguments: Sequence[str], option: str) -> str | None:
    """Return the last value of an option that is written --like_this or --like-this, with a space or an = behind."""
    value = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        name, equals, attached = word.partition("=")
        if name.replace("-", "_") == f"__{option}":
            value = attached if equals else following
    return value
