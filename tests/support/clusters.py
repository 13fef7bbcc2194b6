"""Stand-ins for clusters: a shared folder with the programs that templates call, hosts, and four schedulers.

A scheduler runs its template of examples/cluster as it is, by bash where it is a script. `srun`, `scontrol` and `hf`
are small scripts; `gpt-kit` is the command itself, in a process forked from one that has imported everything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import gpt_kit_hf.commands.train  # noqa: F401  (before the server forks)
from gpt_kit_hf.commands.main import main as gpt_kit
from gpt_kit_hf.storage import lock

TEMPLATES = Path(__file__).resolve().parents[2] / "examples" / "cluster"
_STEPS = 40
_LEASE = 0.6  # seconds
PATIENCE = 120.0  # seconds for what must happen

_CONFIG = f"""
text_files: [TEXTS/part*.txt]
encoding: bytes
max_length: 32
max_position_embeddings: 32
n_layer: 2
n_head: 2
n_embd: 32
dropout: 0.2
learning_rate: 3.0e-3
warmup_steps: 3
batch_size: 8
max_steps: {_STEPS}
eval_steps: 9
max_eval_samples: 4
save_steps: 3
logging_steps: 100
sample_steps: 0
report_to: [none]
use_cpu: true
mixed_precision: fp32
"""

# The command, for the shell of a template: asks the server below, passes SIGTERM on, and ends with its exit code.
_CLIENT = """
import json, os, signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["GPT_KIT_SERVER"])
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(asked).to_bytes(4, "big")], [1, 2])
server.sendall(asked)
answers = server.makefile()
pid = int(answers.readline())
signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
sys.exit(int(answers.readline() or 143))  # 143: the signal came before Python handled it
"""
_SRUN = """#!/bin/bash
echo $$ > "$CLUSTER/step.pid"
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"
"""
_SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) echo "$2" > "$CLUSTER/requeued" ;;
esac
"""
# Of `hf jobs run` only the command in the container.
_HF = """#!/bin/bash
while [ "$1" != bash ]; do
    [ "$1" = --attempts ] && echo "$2" > "$CLUSTER/attempts"
    shift
done
exec "$@"
"""


@dataclass(kw_only=True)
class Cluster:
    """A folder that all hosts see, with the stand-ins and a run."""

    folder: Path
    attempt: int = 0

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "mine"

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node"}
        server = {"GPT_KIT_SERVER": str(self.folder / "server"), "CLUSTER": str(self.folder)}
        return {**os.environ, "PATH": path, **slurm, **server, "HOST": f"node-{self.attempt}"}

    def mapped(self, text: str) -> str:
        """Return a template with its folders and its bucket in this one."""
        for place in ("/shared/runs", "/runs", "/config"):
            text = re.sub(rf"(?<![\w.]){place}\b", str(self.folder / place.split("/")[-1]), text)
        return text.replace("hf://", f"file://{self.folder}/")

    def install(self, texts: Path) -> None:
        """Write configuration and stand-ins."""
        config = _CONFIG.replace("TEXTS", str(texts))
        stand_ins = {"srun": _SRUN, "scontrol": _SCONTROL, "hf": _HF, "pip": "#!/bin/bash\n"}
        stand_ins["sleep"] = "#!/bin/bash\nexec /bin/sleep 0.1\n"
        stand_ins["gpt-kit"] = f"#!{sys.executable} -IS\n{_CLIENT}"
        for name in ("bin", "runs", "config"):
            (self.folder / name).mkdir(parents=True)
        for name in ("runs", "config"):
            (self.folder / name / "config.yaml").write_text(config)
        for name, content in stand_ins.items():
            (self.folder / "bin" / name).write_text(content)
            (self.folder / "bin" / name).chmod(0o755)


# --- the server that forks ------------------------------------------------------------------------------------


def serve(address: Path, pid_file: Path) -> int:
    """Fork a server; it forks a process for each `gpt-kit` that asks. Return its pid."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    if pid := os.fork():
        listener.close()
        return pid
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            try:
                _answer(client, pid_file)
            finally:
                os._exit(1)  # the client was killed meanwhile
        client.close()


def _answer(client: socket.socket, pid_file: Path) -> None:
    """Run the command that a client asks for, with its streams, folder and environment, and never return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(client, 4, 2)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += client.recv(1 << 16)
    arguments, folder, environment = json.loads(asked)
    pid_file.write_text(str(os.getpid()))
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    socket.gethostname = lambda: environment["HOST"]
    lock.LEASE_SECONDS = _LEASE
    torch.set_num_threads(1)
    client.sendall(f"{os.getpid()}\n".encode())
    code = 1
    try:
        code = gpt_kit(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        pid_file.unlink(missing_ok=True)
        client.sendall(f"{code}\n".encode())
        os._exit(code)


# --- the platforms --------------------------------------------------------------------------------------------


class Platform:
    """A scheduler: starts a job from its template, interrupts it, and decides whether it starts again."""

    template: str

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.text = cluster.mapped((TEMPLATES / self.template).read_text())

    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def grace(self) -> float:
        """Seconds from SIGTERM to SIGKILL."""
        return PATIENCE

    def begin(self) -> subprocess.Popen[str]:
        self.cluster.attempt += 1
        (self.cluster.folder / "pid").unlink(missing_ok=True)
        with (self.cluster.folder / "output").open("a") as output:
            return subprocess.Popen(
                self.command(), env=self.cluster.environment(), stdout=output, stderr=output, text=True,
                start_new_session=True,
            )  # fmt: skip

    def terminate(self, job: subprocess.Popen[str]) -> None:
        """Send SIGTERM to what gets it on this platform."""
        os.killpg(job.pid, signal.SIGTERM)

    def starts_again(self, code: int, lost: bool) -> bool:
        raise NotImplementedError


class Slurm(Platform):
    """The signal before the time limit goes to the processes of the step, and the script asks for a requeue."""

    template = "slurm.sh"

    def command(self) -> list[str]:
        (self.cluster.folder / "slurm.sh").write_text(self.text)
        for name in ("requeued", "step.pid"):
            (self.cluster.folder / name).unlink(missing_ok=True)
        return ["bash", str(self.cluster.folder / "slurm.sh")]

    @property
    def grace(self) -> float:
        found = re.search(r"^#SBATCH --signal=TERM@(\d+)", self.text, re.MULTILINE)
        assert found, "the step gets no signal"
        return float(found[1])

    def terminate(self, job: subprocess.Popen[str]) -> None:
        step = self.cluster.folder / "step.pid"
        while job.poll() is None and not (step.exists() and step.read_text()):
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            os.kill(int(step.read_text()), signal.SIGTERM)

    def starts_again(self, code: int, lost: bool) -> bool:
        if lost:
            return re.search(r"^#SBATCH --requeue\b", self.text, re.MULTILINE) is not None
        requeued = self.cluster.folder / "requeued"
        return requeued.exists() and requeued.read_text() == "7\n"


class SkyPilot(Platform):
    """A lost machine is replaced; a job that ends on its machine starts again for some exit codes."""

    template = "skypilot.yaml"

    def command(self) -> list[str]:
        return ["bash", "-c", yaml.safe_load(self.text)["run"]]

    def starts_again(self, code: int, lost: bool) -> bool:
        recovery = yaml.safe_load(self.text)["resources"]["job_recovery"]
        return lost or code in recovery["recover_on_exit_codes"]


class Kubernetes(Platform):
    """The first process of a container gets SIGTERM; the rules of the job decide about the next pod."""

    template = "kubernetes.yaml"

    @property
    def job(self) -> dict[str, Any]:
        return yaml.safe_load(self.text)["spec"]  # type: ignore[no-any-return]

    @property
    def pod(self) -> dict[str, Any]:
        pod: dict[str, Any] = self.job["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        return pod

    def command(self) -> list[str]:
        [container] = self.pod["containers"]
        name, *arguments = container["command"]
        return [str(self.cluster.folder / "bin" / name), *arguments]

    @property
    def grace(self) -> float:
        return float(self.pod["terminationGracePeriodSeconds"])

    def terminate(self, job: subprocess.Popen[str]) -> None:
        job.terminate()

    def starts_again(self, code: int, lost: bool) -> bool:
        for rule in self.job["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes", {})
            conditions = [condition["type"] for condition in rule.get("onPodConditions", [])]
            if (lost and "DisruptionTarget" in conditions) or code in codes.get("values", []):
                return bool(rule["action"] == "Ignore")
        return False


class HFJobs(Platform):
    """The first process of a container gets SIGTERM; its disk is lost, and failed attempts are repeated."""

    template = "hf_jobs.sh"

    def command(self) -> list[str]:
        shutil.rmtree(self.cluster.folder / "runs", ignore_errors=True)
        (self.cluster.folder / "hf_jobs.sh").write_text(self.text)
        return ["bash", str(self.cluster.folder / "hf_jobs.sh"), "user/my-runs"]

    def terminate(self, job: subprocess.Popen[str]) -> None:
        job.terminate()

    def starts_again(self, code: int, lost: bool) -> bool:
        return self.cluster.attempt % 1000 < int((self.cluster.folder / "attempts").read_text()) or lost


PLATFORMS: Mapping[str, type[Platform]] = {
    "slurm": Slurm, "skypilot": SkyPilot, "kubernetes": Kubernetes, "hf_jobs": HFJobs,
}  # fmt: skip
