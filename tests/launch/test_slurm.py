"""Tests launch/slurm.sbatch: it trains with several tasks, saves at SIGTERM, and resumes.

`srun`, `squeue` and `scontrol` are fakes. The batch file, JAX's detection of SLURM, the processes,
their network and their checkpoints are real.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from jax._src import clusters

from leon_jax.train.supervisor import STUCK
from tests.train.test_decoder_program import write_data

ROOT = pathlib.Path(__file__).parents[2]
BATCH = ROOT / "launch" / "slurm.sbatch"
FOREVER = 1_000_000

CONFIG = """
import pathlib
from tests.train import test_decoder_program

def get_config():
    config = test_decoder_program.make_config(pathlib.Path({folder!r}))
    config.steps = config.optimizer.total_steps = {steps}
    config.samples.image = ""
    config.loop = dict(log_every=1, save_every={forever}, mesh=(2, 1, 1, 1), data_shards=2)
    return config
"""


def directives() -> dict[str, str]:
    """Returns the sbatch options in the file."""
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", BATCH.read_text(), re.MULTILINE)
    return dict(options)


def program(path: pathlib.Path, *lines: str) -> None:
    """Writes an executable shell script."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def job_id() -> int:
    """Returns a job id for which the coordinator's port, which JAX derives from it, is free."""
    for number in range(1, 4096):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", number + 65535 - 4095))
            except OSError:
                continue
        return number
    raise AssertionError("no port is free")


class Cluster:
    """A cluster of one node with two tasks, in a folder."""

    def __init__(self, folder: pathlib.Path, state: str = "RUNNING") -> None:
        self.folder, bin = folder, folder / "bin"
        bin.mkdir()
        srun = ROOT / "tests" / "launch" / "fake_srun.py"
        program(bin / "srun", f'exec {sys.executable} {srun} "$@"')
        program(bin / "leon", f'exec {sys.executable} -m leon_jax.cli.main "$@"')
        program(bin / "squeue", f"echo {state}")
        program(bin / "scontrol", f'echo "$@" >> {folder}/scontrol.log')
        # sbatch runs a copy of the file, in the folder of the submission.
        self.script = shutil.copy(BATCH, folder / "slurm_script")
        self.environment = os.environ | {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "LEON": str(bin / "leon"),
            "JAX_PLATFORMS": "cpu",
            # There are few steps, so most of the time goes into compiling.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "FAKE_SLURM": str(folder),
            "SLURM_JOB_ID": str(job_id()),
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }

    def start(self, *flags: str) -> subprocess.Popen:
        (self.folder / "srun.pid").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", self.script, *flags],
            env=self.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def requeued(self) -> list[str]:
        log = self.folder / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []


def lines(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_two_tasks_save_at_sigterm_are_requeued_and_resume(tmp_path):
    write_data(tmp_path)
    cluster, workdir, config = Cluster(tmp_path), tmp_path / "run", tmp_path / "config.py"
    flags = (f"--config={config}", f"--workdir={workdir}")

    def write(steps: int) -> None:
        config.write_text(CONFIG.format(folder=str(tmp_path), steps=steps, forever=FOREVER))

    write(FOREVER)
    job = cluster.start(*flags)
    deadline = time.monotonic() + 120
    while len(lines(workdir)) < 5 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.poll() is None, job.stderr.read()
    # Shortly before the time limit SLURM signals the tasks, but not the shell.
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    messages = job.communicate(timeout=120)[1]
    assert job.returncode == 143, messages
    saved = len(lines(workdir))
    assert f"stopped by a signal; step {saved} is saved" in messages
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()] == [
        str(saved)
    ]
    assert cluster.requeued() == [f"requeue {cluster.environment['SLURM_JOB_ID']}"]

    write(saved + 5)
    job = cluster.start(*flags)
    messages = job.communicate(timeout=120)[1]
    assert job.returncode == 0, messages
    assert f"resumed from step {saved}" in messages
    assert [line["step"] for line in lines(workdir)] == list(range(1, saved + 6))
    assert (workdir / "export" / "decoder.safetensors").is_file()
    assert len(cluster.requeued()) == 1, "a finished job is not requeued"


@pytest.mark.parametrize(
    ("state", "is_requeued"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)]
)
def test_only_a_running_job_requeues_itself(tmp_path, state, is_requeued):
    """After `scancel` or a preemption, which signal the shell too, the job is no longer RUNNING."""
    cluster = Cluster(tmp_path, state)
    program(tmp_path / "bin" / "leon", "trap 'exit 143' TERM", "while :; do sleep 0.05; done")
    job = cluster.start("--config=any")
    deadline = time.monotonic() + 30
    while not (tmp_path / "srun.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    messages = job.communicate(timeout=30)[1]
    assert job.returncode == 143, messages
    assert bool(cluster.requeued()) == is_requeued


def test_a_job_in_which_a_step_does_not_end_is_requeued(tmp_path):
    cluster = Cluster(tmp_path)
    program(tmp_path / "bin" / "leon", f"exit {STUCK}")
    job = cluster.start("--config=any")
    assert job.wait(timeout=60) == STUCK
    assert len(cluster.requeued()) == 1


def test_a_job_that_fails_with_a_mistake_is_not_requeued(tmp_path):
    cluster = Cluster(tmp_path)
    job = cluster.start(f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/run")
    messages = job.communicate(timeout=120)[1]
    assert job.returncode == 2 and "none.py" in messages
    assert cluster.requeued() == []


def test_jax_assigns_each_task_of_a_node_its_own_gpu(monkeypatch):
    options = directives()
    nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
    detected = []
    for number in range(nodes * tasks):
        environment = {
            "SLURM_JOB_ID": "4711",
            "SLURM_STEP_NODELIST": "gpu[07-08]",
            "SLURM_NTASKS": nodes * tasks,
            "SLURM_PROCID": number,
            "SLURM_LOCALID": number % tasks,
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        detected.append(clusters.ClusterEnv.auto_detect_unset_distributed_params(*[None] * 5, 1))
    addresses, counts, ids, devices = zip(*detected, strict=True)
    assert set(addresses) == {f"gpu07:{4711 % 4096 + 65535 - 4095}"}
    assert set(counts) == {nodes * tasks} and list(ids) == list(range(nodes * tasks))
    gpus = [[number] for number in range(int(options["gpus-per-node"]))]
    assert list(devices) == gpus * nodes


@pytest.mark.parametrize("option", ["gpus-per-task", "gpu-bind", "gres"])
def test_no_option_hides_gpus_from_a_task(option):
    assert option not in directives()
