"""Tests launch/tpu_vm.sh: it requests slices, starts the run, and restarts it after a preemption.

gcloud is tests/launch/fake_cloud.py, which accepts only flags of gcloud's reference.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tests.test_docs import defined_flags

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_vm.sh"
IMAGE = "us-east5-docker.pkg.dev/project/images/leon:tpu"
# Spaces, quotes and parentheses must arrive unchanged.
FLAGS = [
    "--config=configs/cm3leon_350m.py",
    "--workdir=gs://bucket/it's one",
    "--config.loop.mesh=(2, 8, 1, 1)",
]


class Cloud:
    """A fake cloud in a folder, with predefined answers."""

    def __init__(self, folder: pathlib.Path, states: list[str], statuses: list[str] = ()) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "states").write_text("".join(f"{state}\n" for state in states))
        (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        fake = shlex.join([sys.executable, str(ROOT / "tests" / "launch" / "fake_cloud.py")])
        programs = {"gcloud": f"{fake} gcloud", "sudo": f"{fake} sudo", "mountpoint": "false"}
        for name, command in programs.items():
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            path.chmod(0o755)

    def run(self, *words: str, code: int = 0, **variables: str) -> str:
        """Runs the script and returns its stderr."""
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "FAKE_CLOUD": str(self.folder),
            "IMAGE": IMAGE, "ZONE": "us-east5-b", "POLL": "0",
        }  # fmt: skip
        result = subprocess.run(
            [str(SCRIPT), *words],
            env=environment | variables, capture_output=True, text=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
        assert result.returncode == code, result.stderr
        return result.stderr

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def changes(self) -> list[str]:
        """Returns the calls that changed the cloud, in order."""
        actions = {
            ("gcloud", "create"): "create", ("gcloud", "delete"): "delete",
            ("sudo", "mount"): "mount", ("sudo", "pull"): "pull", ("sudo", "run"): "run",
        }  # fmt: skip
        pairs = ((call[0], word) for call in self.calls() for word in call[1:5])
        return [actions[pair] for pair in pairs if pair in actions]

    def started(self) -> list[list[str]]:
        """Returns the arguments of the image for each time that it was started."""
        return [
            call[call.index(IMAGE) + 1 :] for call in self.calls() if call[1:3] == ["docker", "run"]
        ]


def test_a_run_is_started_and_restarted_after_a_preemption(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE"]
    states += ["SUSPENDING", "SUSPENDED", "", "ACTIVE", "ACTIVE", "ACTIVE"]
    statuses = ["none", "running 0", "none", "running 0", "exited 0"]
    cloud = Cloud(tmp_path, states, statuses)
    assert "finished" in cloud.run("keep", *FLAGS)
    start = ["create", "pull", "run"]
    assert cloud.changes() == [*start, "delete", *start]
    first, second = cloud.started()
    assert first == second == ["train", "--distributed", *FLAGS, "--config.loop.slices=1"]


def test_the_flags_are_those_of_leon_train(tmp_path):
    cloud = Cloud(tmp_path, [])
    cloud.run("start", *FLAGS)
    ((verb, *flags),) = cloud.started()
    names = {flag.removeprefix("--").split("=")[0].split(".")[0] for flag in flags}
    assert names <= defined_flags(verb)
    # leon train understands them in this order: it gets as far as the devices.
    flags.remove("--distributed")
    command = [sys.executable, "-m", "leon_jax.cli.main", verb, *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "config.loop.mesh: " in result.stderr, result.stderr


@pytest.mark.parametrize("share", ["", "10.0.0.2:/runs"])
def test_all_hosts_pull_the_image_and_mount_a_share_if_there_is_one(tmp_path, share):
    cloud = Cloud(tmp_path, [])
    cloud.run("install", SHARE=share)
    cloud.run("start", SHARE=share)
    (ssh, *on_host) = cloud.calls()
    assert {"--node=all", "--worker=all", "--zone=us-east5-b"} <= set(ssh)
    assert ["sudo", "docker", "pull", "--quiet", IMAGE] in on_host
    assert (["sudo", "mount", "-t", "nfs", share, "/runs"] in on_host) == bool(share)
    (started,) = (call for call in on_host if call[1:3] == ["docker", "run"])
    assert ("--volume=/runs:/runs" in started) == bool(share)


def test_a_restart_is_the_next_attempt_of_the_same_run(tmp_path):
    """So it takes the lock of a workdir in a bucket at once."""
    cloud = Cloud(tmp_path, ["ACTIVE"] * 3, ["exited 134", "exited 142", "exited 0"])
    cloud.run("keep", *FLAGS, POLL="1.1")
    starts = [call for call in cloud.calls() if call[1:3] == ["docker", "run"]]
    attempts = []
    for call in starts:
        assert "--env=LEON_RUN=us-east5-b/leon" in call
        (attempt,) = (word for word in call if word.startswith("--env=LEON_ATTEMPT="))
        attempts.append(int(attempt.partition("ATTEMPT=")[2]))
    assert len(attempts) == 2 and attempts[0] < attempts[1]


def test_one_slice_is_one_node_and_several_slices_have_a_node_count(tmp_path):
    cloud = Cloud(tmp_path, [])
    cloud.run("create", NAME="one", SPOT="no")
    cloud.run("create", NAME="two", SLICES="2")
    cloud.run("start", SLICES="2")
    one, two, *_ = cloud.calls()
    assert "--node-id=one" in one and "--spot" not in one
    assert {"--node-count=2", "--node-prefix=two", "--spot"} <= set(two)
    assert "--config.loop.slices=2" in cloud.started()[0]


def test_a_crash_is_restarted_and_a_mistake_is_not(tmp_path):
    cloud = Cloud(tmp_path, ["ACTIVE"] * 3, ["exited 134", "running 0", "exited 2"])
    assert "mistake" in cloud.run("keep", *FLAGS, code=2)
    assert cloud.changes() == ["pull", "run"]


def test_an_unknown_state_changes_nothing(tmp_path):
    cloud = Cloud(tmp_path, ["fail", "ACTIVE", "ACTIVE"], ["unreachable", "exited 0"])
    cloud.run("keep", *FLAGS)
    assert cloud.changes() == []


def test_unreachable_hosts_are_tried_again(tmp_path):
    cloud = Cloud(tmp_path, ["ACTIVE"] * 3, ["none", "unreachable", "none", "exited 0"])
    assert "not all hosts could start" in cloud.run("keep", *FLAGS)
    assert cloud.changes() == ["pull", "run"]


@pytest.mark.parametrize(
    ("states", "code"),
    [(["WAITING_FOR_RESOURCES", "fail", "ACTIVE"], 0), (["PROVISIONING", "FAILED"], 1), ([""], 1)],
)
def test_ready_waits_until_the_slices_are_active_or_failed(tmp_path, states, code):
    Cloud(tmp_path, states).run("ready", code=code)
    assert (tmp_path / "states").read_text() == ""


def test_stop_gives_the_run_time_to_save(tmp_path):
    cloud = Cloud(tmp_path, [])
    cloud.run("stop")
    assert cloud.calls()[-1] == ["sudo", "docker", "stop", "--time=600", "leon"]


@pytest.mark.parametrize("name", ["IMAGE", "ZONE"])
def test_missing_variables_are_named(tmp_path, name):
    assert f"{name}: " in Cloud(tmp_path, []).run("create", code=1, **{name: ""})


def test_an_unknown_step_prints_the_usage(tmp_path):
    assert "keep" in Cloud(tmp_path, []).run("rm", code=2)
