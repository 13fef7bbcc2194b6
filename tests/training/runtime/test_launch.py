"""Launches that start too few processes, those that do not, and the configurations in examples/accelerate."""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

import gpt_kit_hf
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.training.runtime.launch import check_launch, end_processes, launcher_pid

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATIONS = sorted((ROOT / "examples/accelerate").glob("*.yaml"))
ACCELERATE = ["-m", "accelerate.commands.launch"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
FREE_PORT = "--main_process_port=0"

SCRIPT = f"""
import json, os, sys, time, types

# The modules alone: to import all of the package takes seconds.
package = sys.modules["gpt_kit_hf"] = types.ModuleType("gpt_kit_hf")
package.__path__ = {list(gpt_kit_hf.__path__)!r}
from accelerate import Accelerator
from gpt_kit_hf.errors import UsageError
from gpt_kit_hf.training.runtime.launch import check_launch, launcher_pid

accelerator = Accelerator(cpu="--cpu" in sys.argv)
found = {{"pid": os.getpid(), "parent": os.getppid(), "launcher": launcher_pid()}}
found |= {{"processes": accelerator.num_processes, "refused": None}}
try:
    check_launch(accelerator)
except UsageError as error:
    found["refused"] = str(error)
os.write(1, json.dumps(found).encode() + b"\\n")  # in one piece: two processes share the pipe
deadline = time.monotonic() + 60
while "--until-alone" in sys.argv and time.monotonic() < deadline and os.getppid() == found["launcher"]:
    time.sleep(0.05)
if "--until-alone" in sys.argv:
    os.write(1, json.dumps({{"alone": os.getppid() != found["launcher"]}}).encode() + b"\\n")
accelerator.end_training()
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a launch sees: no GPU, no default configuration of Accelerate's but in the folder, loopback only."""
    alone = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder)}
    return {**os.environ, **alone, **more}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def run(command: list[str], folder: Path, **more: str) -> list[dict[str, Any]]:
    """Run a command in the folder and return what each of its processes printed."""
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


# --- real launches


def test_accelerate_that_starts_one_process_of_two_is_refused(script: Path, tmp_path: Path) -> None:
    asked = ["--cpu", "--num_processes", "2", "script.py", "--num_processes", "7"]
    [found] = run([sys.executable, *ACCELERATE, *asked], tmp_path)
    assert found["processes"] == 1
    assert found["launcher"] == found["parent"]
    assert found["refused"] == (
        "2 processes were asked for, but 1 was found: launch with "
        "`torchrun --nproc_per_node 2 script.py ... --use_cpu` or "
        "`accelerate launch --multi_gpu --num_processes 2 script.py ... --use_cpu`"
    )


def test_processes_of_torchrun_that_do_not_find_each_other_are_refused(script: Path, tmp_path: Path) -> None:
    found = run([sys.executable, *TORCHRUN, "--nproc-per-node=2", "script.py"], tmp_path)
    assert len({process["pid"] for process in found}) == 2
    for process in found:
        assert process["processes"] == 1
        assert process["refused"].startswith("2 processes were asked for, but 1 was found: ")
        assert process["launcher"] == process["parent"]


def test_two_processes_of_torchrun_are_accepted(script: Path, tmp_path: Path) -> None:
    found = run([sys.executable, *TORCHRUN, "--nproc-per-node=2", "script.py", "--cpu"], tmp_path)
    assert len({process["pid"] for process in found}) == 2
    for process in found:
        assert process["processes"] == 2
        assert process["refused"] is None
        assert process["launcher"] == process["parent"]


def test_a_shell_with_variables_of_other_launches_is_accepted(script: Path, tmp_path: Path) -> None:
    stray = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    stray |= {"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    words = f"{shlex.quote(sys.executable)} script.py accelerate launch --num_processes 2; exit $?"
    [found] = run(["sh", "-c", words], tmp_path, **stray)
    assert found["processes"] == 1
    assert found["launcher"] is None
    assert found["refused"] is None


def test_a_process_sees_that_its_launcher_was_killed(script: Path, tmp_path: Path) -> None:
    accelerate = [sys.executable, *ACCELERATE, "--num_processes", "1", "script.py", "--until-alone"]
    with subprocess.Popen(
        accelerate, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as launcher:
        assert launcher.stdout is not None
        try:
            found = json.loads(launcher.stdout.readline())
            assert found["launcher"] == launcher.pid
            assert found["refused"] is None
        finally:
            launcher.send_signal(signal.SIGKILL)
        assert json.loads(launcher.stdout.readline()) == {"alone": True}


# --- command lines


class Parent:
    """A parent process, as psutil shows it."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.pid, self._command, self._folder = 4321, command, folder

    def cmdline(self) -> list[str]:
        return self._command

    def cwd(self) -> str:
        return str(self._folder)


def started_by(monkeypatch: pytest.MonkeyPatch, folder: Path, parent: str, own: str) -> None:
    monkeypatch.setattr(psutil, "Process", lambda pid: Parent(parent.split(), folder))
    monkeypatch.setattr(sys, "orig_argv", own.split())
    monkeypatch.setattr(sys, "argv", own.split()[1:])


LAUNCHERS = [
    "torchrun --nproc_per_node 2 x.py",
    "/usr/bin/python3 /usr/bin/torchrun --nproc_per_node 2 x.py",
    "python -X dev -u -m torch.distributed.run x.py",
    "python3.13 -um torch.distributed.run x.py",
    "python -mtorch.distributed.launch x.py",
    "/opt/venv/bin/python3 /opt/venv/bin/accelerate launch x.py",
    "accelerate-launch x.py",
    "python -m accelerate.commands.accelerate_cli launch x.py",
    r"python.exe Scripts/accelerate.exe launch x.py",
]
OTHERS = [
    "bash",
    "-bash",
    "nohup python x.py",
    "sh -c accelerate launch --num_processes 2 y.py",
    "python start.py accelerate launch --num_processes 2 y.py",
    "python -c torchrun",
    "python -m ipykernel_launcher -f kernel.json",
    "accelerate config",
    "accelerate test launch",
    "mpirun -n 2 python x.py",
    "srun torchrun x.py",
    "/sbin/init",
    "python",
    "",
]


@pytest.mark.parametrize("command", [*LAUNCHERS, *OTHERS])
def test_only_a_launcher_is_one(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch, tmp_path, command, "python x.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher_pid() == (4321 if command in LAUNCHERS else None)


def test_a_parent_that_cannot_be_inspected_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> None:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", refuse)
    assert launcher_pid() is None


def alone(device: str = "cpu") -> Any:
    return SimpleNamespace(num_processes=1, device=torch.device(device))


@pytest.mark.parametrize(
    ("arguments", "own", "asked"),
    [
        ("--num_processes 3 x.py", "python x.py", 3),
        ("--num-processes=3 x.py", "python -u x.py", 3),
        ("--num_processes 2 --num_processes 3 x.py --a 1", "python x.py --a 1", 3),
        ("--num_processes 3 -m package.module --num_processes 1", "python -m package.module --num_processes 1", 3),
        ("--num_processes 1 x.py --num_processes 3", "python x.py --num_processes 3", 1),
        ("x.py --num_processes 3", "python x.py --num_processes 3", 1),
        ("--no_python gpt-kit train --num_processes=3", "python bin/gpt-kit train --num_processes=3", 1),
        ("--num_machines 1 x.py", "python x.py", 1),
        # What follows is written in a file.
        ("--config_file four.yaml x.py", "python x.py", 4),
        ("--cpu --config_file=four.yaml x.py", "python x.py", 4),
        ("--config_file four.yaml --num_processes 1 x.py", "python x.py", 1),
        ("--config_file gone.yaml x.py", "python x.py", 1),
    ],
)
def test_what_accelerate_was_asked_for(
    arguments: str, own: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "four.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 4\n")
    started_by(monkeypatch, tmp_path, f"accelerate launch {arguments}", own)
    if asked == 1:
        check_launch(alone())
        return
    with pytest.raises(UsageError, match=f"^{asked} processes were asked for, but 1 was found"):
        check_launch(alone())
    together = alone()
    together.num_processes = asked
    check_launch(together)


def test_the_default_configuration_counts_if_accelerate_reads_it(script: Path, tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 3\nuse_cpu: true\n"
    )
    [found] = run([sys.executable, *ACCELERATE, "script.py"], tmp_path)
    assert found["processes"] == 1
    assert found["refused"].startswith("3 processes were asked for, but 1 was found: ")


def test_torchrun_tells_its_processes_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_by(monkeypatch, tmp_path, "torchrun x.py", "python x.py")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launch(alone())
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"^4 processes") as raised:
        check_launch(alone("cuda"))
    assert "--cpu" not in str(raised.value)
    assert "accelerate launch --multi_gpu --num_processes 4 x.py" in str(raised.value)


def test_the_process_group_outlives_the_models_that_hold_it(tmp_path: Path) -> None:
    """A model of DDP that drops the last reference runs the destructor with Python's lock held, and can deadlock."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    accelerator: Any = SimpleNamespace(num_processes=2, end_training=dist.destroy_process_group)
    end_processes(accelerator)
    gc.collect()
    assert not dist.is_initialized()
    assert group() is not None


# --- the configurations


def test_each_configuration_is_there() -> None:
    names = ["cpu.yaml", "ddp.yaml", "ddp_machines.yaml", "fsdp2.yaml"]
    assert [path.name for path in CONFIGURATIONS] == names


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes > 1
    assert config.mixed_precision == "no"  # the word, not YAML's false
    assert config.num_machines == (2 if path.stem == "ddp_machines" else 1)
    kinds = {"fsdp2": DistributedType.FSDP}
    assert config.distributed_type == kinds.get(path.stem, DistributedType.MULTI_GPU)
    command = [line for line in path.read_text().splitlines() if line.startswith("#   accelerate launch ")]
    assert len(command) == 1
    words = command[0].removeprefix("#").split()
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    assert files[0] == f"examples/accelerate/{path.name}"
    assert all((ROOT / file).is_file() for file in files), files


def test_fsdp2_is_configured_as_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(
        "import json\n"
        "from accelerate.utils import FullyShardedDataParallelPlugin\n"
        "plugin = FullyShardedDataParallelPlugin()\n"  # from the variables that the launcher has set
        "print(json.dumps({'version': plugin.fsdp_version, 'wrap': plugin.auto_wrap_policy.__name__,\n"
        "    'names': plugin.transformer_cls_names_to_wrap, 'reshard': plugin.reshard_after_forward,\n"
        "    'state': plugin.state_dict_type.name, 'recompute': plugin.activation_checkpointing,\n"
        "    'on one': plugin.cpu_ram_efficient_loading, 'offload': plugin.cpu_offload.__class__.__name__}))\n"
    )
    file = str(ROOT / "examples/accelerate/fsdp2.yaml")
    [found] = run([sys.executable, *ACCELERATE, "--config_file", file, "--num_processes=1", "look.py"], tmp_path)
    assert found == {
        "version": 2,
        "wrap": "transformer_auto_wrap_policy",
        "names": None,  # then Accelerate asks the model
        "reshard": True,
        "state": "SHARDED_STATE_DICT",
        "recompute": False,
        "on one": False,
        "offload": "OffloadPolicy",  # the one that offloads nothing
    }


def test_the_configuration_for_a_cpu_trains_on_two_processes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Shall I compare thee to a summer's day? " * 60)
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--max_position_embeddings=16", "--max_length=16"]
    course = ["--encoding=bytes", "--batch_size=4", "--max_steps=3", "--eval_steps=100", "--save_steps=100"]
    quiet = ["--sample_steps=0", "--report_to=none", "--mixed_precision=fp32", "--use_cpu"]
    folder, text = f"--output_dir={tmp_path / 'run'}", f"--text_files={tmp_path / 'text.txt'}"
    launch = ["--config_file", "examples/accelerate/cpu.yaml", "examples/pretrain.py"]
    ended = subprocess.run(
        [sys.executable, *ACCELERATE, *launch, folder, text, *shape, *course, *quiet],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["processes"] == 2
    assert record["results"]["steps"] == 3
