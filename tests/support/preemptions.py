"""Preempt runs that the templates of examples/cluster start, and compare each with one that nothing interrupted.

    python tests/support/preemptions.py slurm skypilot kubernetes hf_jobs --preemptions 20

The schedulers are those of clusters.py. At random moments they send SIGTERM, or SIGKILL as if the machine was lost.
They start the job again if the platform would, each time on a host of another name. In the end batches, losses,
weights and optimizer must be those of a run that nothing interrupted, to the bit. Ends with 1 if any are not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from clusters import PATIENCE, PLATFORMS, Cluster, Kubernetes, Platform, serve
from kill_campaign import differences_at_the_end, write_texts

from gpt_kit_hf.training.runtime.signals import EXIT_STOPPED


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
    job.wait(PATIENCE)


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
            job.wait(PATIENCE)
            kill(job, cluster)
            finished = job.returncode == 0
            if finished:
                count.runs += 1
                count.faults += differences_at_the_end(base / "whole", cluster.run)
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


def run_campaigns(names: Sequence[str], preemptions: int, seed: int, base: Path) -> dict[str, Count]:
    """Run the campaign of each template; print a line for each."""
    datasets.config.HF_DATASETS_CACHE = base / "datasets"
    (base / "texts").mkdir()
    write_texts(base / "texts")
    whole = Cluster(folder=base / "uninterrupted")
    whole.install(base / "texts")
    server = serve(whole.folder / "server", whole.folder / "pid")
    job = Kubernetes(whole).begin()
    assert job.wait(PATIENCE) == 0, (whole.folder / "output").read_text()
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
