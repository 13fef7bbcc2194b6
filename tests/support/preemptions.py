"""Preempt runs that the templates of examples/cluster start, and compare each with one that nothing interrupted.

    python tests/support/preemptions.py slurm skypilot kubernetes hf_jobs --preemptions 20

A template is run as it is, by bash where it is a script. What it talks to is a stand-in: `srun`, `scontrol`, `hf` and
the scheduler. That sends SIGTERM, or SIGKILL as if the machine was lost, at random moments. It starts the job again if
the platform would, each time on a host of another name. `gpt-kit` is the command itself, in a process forked from one
that has imported everything. In the end batches, losses, weights and optimizer must be those of a run that nothing
interrupted, to the bit. Ends with 1 if any are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from kill_campaign import write_texts
from safetensors.torch import load_file

import gpt_kit_hf.commands.train  # noqa: F401
from gpt_kit_hf.commands.main import main as gpt_kit
from gpt_kit_hf.storage import lock
from gpt_kit_hf.storage.atomic_files import read_jsonl
from gpt_kit_hf.storage.checkpoints import list_checkpoints
from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED
from gpt_kit_hf.training.verify import verify_run

TEMPLATES = Path(__file__).resolve().parents[2] / "examples" / "cluster"
_STEPS = 40
_LEASE = 0.6  # seconds
_PATIENCE = 120.0  # seconds for what must happen

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
# Of `hf jobs run` only the command in the container, of `hf buckets sync` a copy that excludes the same names.
_HF = """#!/bin/bash
if [ "$1 $2" = "jobs run" ]; then
    while [ "$1" != bash ]; do
        [ "$1" = --env ] && export "$2"
        [ "$1" = --attempts ] && echo "$2" > "$CLUSTER/attempts"
        shift
    done
    exec "$@"
fi
from=${3/#hf:\\/\\//$CLUSTER/} to=${4/#hf:\\/\\//$CLUSTER/}
mkdir -p "$from" "$to"
[ "$from" = "$3" ] && copy=$to.copy || copy=$to
[ "$from" = "$3" ] && rm -rf "$copy"
mkdir -p "$copy"
cd "$from" && find . -type f -not -name "run.lock" -not -path "*/.*" -not -name ".*" -print0 |
    xargs -0 -r cp --parents --preserve=timestamps -t "$copy" 2> /dev/null
[ "$copy" = "$to" ] || { rm -rf "$to"; mv "$copy" "$to"; }
true
"""


@dataclass(kw_only=True)
class Count:
    """What happened to the runs of a template."""

    terminated: int = 0
    killed: int = 0
    before_the_first_step: int = 0
    attempts: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def preemptions(self) -> int:
        return self.terminated + self.killed


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
        """Return a template with its folders in this one."""
        for place in ("/shared/runs", "/runs", "/config"):
            text = re.sub(rf"(?<![\w.]){place}\b", str(self.folder / place.split("/")[-1]), text)
        return text

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
        return _PATIENCE

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


# --- the campaign ---------------------------------------------------------------------------------------------


def steps_done(run: Path) -> int:
    """Return the number of lines in a run's metrics."""
    with suppress(FileNotFoundError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def wait_for_the_moment(job: subprocess.Popen[str], run: Path, draw: random.Random) -> bool:
    """Wait for a random time, or for a random number of steps; return whether the job still runs."""
    began, before = time.monotonic(), steps_done(run)
    at_the_start, more = draw.random() < 0.25, draw.randrange(1, 6)
    seconds, after = draw.random() * 1.0, draw.random() * 0.03
    while job.poll() is None:
        if at_the_start and time.monotonic() - began > seconds:
            return True
        if not at_the_start and steps_done(run) not in range(before + more):
            time.sleep(after)
            return job.poll() is None
        time.sleep(0.002)
    return False


def kill(job: subprocess.Popen[str], cluster: Cluster) -> None:
    """Kill the job and its process of the run, as if the machine was lost; or what a job that ended left running."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    with suppress(ProcessLookupError, FileNotFoundError, ValueError):
        os.kill(int((cluster.folder / "pid").read_text()), signal.SIGKILL)
    job.wait(_PATIENCE)


def preempt(platform: Platform, job: subprocess.Popen[str], draw: random.Random, count: Count) -> None:
    """Interrupt a job, and check that the platform starts it again."""
    lost = draw.random() < 0.3
    if lost:
        kill(job, platform.cluster)
        count.killed += 1
    else:
        platform.terminate(job)
        count.terminated += 1
        try:
            job.wait(platform.grace)
        except subprocess.TimeoutExpired:
            count.faults.append(f"it did not stop in the {platform.grace:.0f} s of grace")
            kill(job, platform.cluster)
    code = job.returncode if job.returncode >= 0 else 128 - job.returncode
    if code and not platform.starts_again(code, lost):
        count.faults.append(f"it ended with {code} and was not started again")


def campaign(name: str, preemptions: int, seed: int, base: Path) -> Count:
    """Preempt runs of a template so many times, let the last one end, and compare each."""
    count, draw = Count(), random.Random(f"{seed} {name}")
    cluster = Cluster(folder=Path(tempfile.mkdtemp(dir=base)))
    cluster.install(base / "texts")
    server = serve(cluster.folder / "server", cluster.folder / "pid")
    platform = PLATFORMS[name](cluster)
    try:
        finished = False
        while not count.faults and not (finished and count.preemptions >= preemptions):
            job = platform.begin()
            count.attempts += 1
            before = steps_done(cluster.run)
            if count.preemptions < preemptions and wait_for_the_moment(job, cluster.run, draw):
                count.before_the_first_step += steps_done(cluster.run) <= before
                preempt(platform, job, draw, count)
            job.wait(_PATIENCE)
            kill(job, cluster)
            finished = job.returncode == 0
            if finished:
                count.runs += 1
                count.faults += differences(base / "whole", cluster.run)
                shutil.move(cluster.run, cluster.folder / f"run-{count.runs}")
                shutil.rmtree(cluster.folder / "buckets", ignore_errors=True)
                cluster.attempt = 1000 * count.runs
            elif job.returncode not in (EXIT_STOPPED, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                count.faults.append(f"exit code {job.returncode}")
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    if count.faults:
        sys.stderr.write((cluster.folder / "output").read_text()[-3000:])
    return count


def differences(whole: Path, run: Path) -> list[str]:
    """Return in what two runs differ: batches, losses, weights, optimizer, position; nothing if to the bit equal."""
    found = []
    if read_jsonl(whole / "metrics.jsonl") != read_jsonl(run / "metrics.jsonl"):
        found.append("metrics.jsonl")
    last = [list_checkpoints(each)[-1] for each in (whole, run)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / name) for folder in last)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            found.append(name)
    if len({(folder / "training_state.json").read_text() for folder in last}) > 1:
        found.append("training_state.json")
    if (whole / "model.safetensors").read_bytes() != (run / "model.safetensors").read_bytes():
        found.append("the model in the root")
    return found + verify_run(run).problems


def run_campaigns(names: Sequence[str], preemptions: int, seed: int, base: Path) -> dict[str, Count]:
    """Run the campaign of each template; print a line for each."""
    datasets.config.HF_DATASETS_CACHE = base / "datasets"
    (base / "texts").mkdir()
    write_texts(base / "texts")
    whole = Cluster(folder=base / "uninterrupted")
    whole.install(base / "texts")
    server = serve(whole.folder / "server", whole.folder / "pid")
    job = Kubernetes(whole).begin()
    assert job.wait(_PATIENCE) == 0, (whole.folder / "output").read_text()
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    shutil.move(whole.run, base / "whole")
    counts = {}
    for name in names:
        counts[name] = count = campaign(name, preemptions, seed, base)
        sys.stdout.write(
            f"{name:10} {count.preemptions:3} preemptions ({count.terminated} SIGTERM, {count.killed} SIGKILL, "
            f"{count.before_the_first_step} before the first step), {count.attempts} attempts, {count.runs} runs: "
            f"{'; '.join(count.faults) or 'identical'}\n"
        )
        sys.stdout.flush()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("templates", nargs="+", choices=PLATFORMS)
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    assert threading.active_count() == 1
    with tempfile.TemporaryDirectory() as base:
        counts = run_campaigns(chosen.templates, chosen.preemptions, chosen.seed, Path(base))
    return int(any(count.faults for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
