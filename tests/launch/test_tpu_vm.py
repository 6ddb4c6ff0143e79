"""launch/tpu_vm.sh asks for slices, starts the run on them, and again when they were taken away.

gcloud is tests/launch/fake_cloud.py: it knows the flags of gcloud's reference and no other.
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
# Spaces, quotes and parentheses must arrive as they are.
FLAGS = [
    "--config=configs/cm3leon_350m.py",
    "--workdir=/runs/it's one",
    "--config.loop.mesh=(2, 8, 1, 1)",
]


class Cloud:
    """A cloud that answers as it is told, in a folder."""

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
        """Runs the script; gives what it says."""
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "FAKE_CLOUD": str(self.folder),
            "IMAGE": IMAGE, "SHARE": "10.0.0.2:/runs", "ZONE": "us-east5-b", "POLL": "0",
        }  # fmt: skip
        done = subprocess.run(
            [str(SCRIPT), *words],
            env=environment | variables, capture_output=True, text=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stderr

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def changes(self) -> list[str]:
        """What was done to the cloud, in order; asking changes nothing."""
        words = {
            ("gcloud", "create"): "create", ("gcloud", "delete"): "delete",
            ("sudo", "mount"): "mount", ("sudo", "pull"): "pull", ("sudo", "run"): "run",
        }  # fmt: skip
        named = ((call[0], word) for call in self.calls() for word in call[1:5])
        return [words[pair] for pair in named if pair in words]

    def started(self) -> list[list[str]]:
        """The arguments of the image, each time that it was run."""
        return [
            call[call.index(IMAGE) + 1 :] for call in self.calls() if call[1:3] == ["docker", "run"]
        ]


def test_a_run_is_started_and_after_a_preemption_started_again(tmp_path):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE"]
    states += ["SUSPENDING", "SUSPENDED", "", "ACTIVE", "ACTIVE", "ACTIVE"]
    statuses = ["none", "running 0", "none", "running 0", "exited 0"]
    cloud = Cloud(tmp_path, states, statuses)
    assert "finished" in cloud.run("keep", *FLAGS)
    once = ["create", "mount", "pull", "run"]
    assert cloud.changes() == [*once, "delete", *once]
    first, second = cloud.started()
    assert first == second == ["train", "--distributed", "--config.loop.slices=1", *FLAGS]


def test_the_flags_are_those_of_leon_train(tmp_path):
    cloud = Cloud(tmp_path, [])
    cloud.run("start", *FLAGS)
    ((verb, *flags),) = cloud.started()
    names = {flag.removeprefix("--").split("=")[0].split(".")[0] for flag in flags}
    assert names <= defined_flags(verb)


def test_every_host_mounts_the_share_and_gets_the_image(tmp_path):
    cloud = Cloud(tmp_path, [])
    cloud.run("install")
    (ssh, *on_host) = cloud.calls()
    assert {"--node=all", "--worker=all", "--zone=us-east5-b"} <= set(ssh)
    assert ["sudo", "mount", "-t", "nfs", "10.0.0.2:/runs", "/runs"] in on_host
    assert on_host[-1] == ["sudo", "docker", "pull", "--quiet", IMAGE]


def test_one_slice_is_a_node_and_several_are_counted(tmp_path):
    cloud = Cloud(tmp_path, [])
    cloud.run("create", NAME="one", SPOT="no")
    cloud.run("create", NAME="two", SLICES="2")
    cloud.run("start", SLICES="2")
    one, two, *_ = cloud.calls()
    assert "--node-id=one" in one and "--spot" not in one
    assert {"--node-count=2", "--node-prefix=two", "--spot"} <= set(two)
    assert "--config.loop.slices=2" in cloud.started()[0]


def test_a_crash_is_started_again_and_a_mistake_is_not(tmp_path):
    cloud = Cloud(tmp_path, ["ACTIVE"] * 3, ["exited 134", "running 0", "exited 2"])
    assert "mistake" in cloud.run("keep", *FLAGS, code=2)
    assert cloud.changes() == ["mount", "pull", "run"]


def test_what_cannot_be_known_changes_nothing(tmp_path):
    cloud = Cloud(tmp_path, ["fail", "ACTIVE", "ACTIVE"], ["unreachable", "exited 0"])
    cloud.run("keep", *FLAGS)
    assert cloud.changes() == []


def test_hosts_that_are_not_up_yet_are_tried_again(tmp_path):
    cloud = Cloud(tmp_path, ["ACTIVE"] * 3, ["none", "unreachable", "none", "exited 0"])
    assert "not every host could start" in cloud.run("keep", *FLAGS)
    assert cloud.changes() == ["mount", "pull", "run"]


@pytest.mark.parametrize(
    ("states", "code"),
    [(["WAITING_FOR_RESOURCES", "fail", "ACTIVE"], 0), (["PROVISIONING", "FAILED"], 1), ([""], 1)],
)
def test_ready_waits_until_it_is_decided(tmp_path, states, code):
    Cloud(tmp_path, states).run("ready", code=code)
    assert (tmp_path / "states").read_text() == ""


def test_stop_lets_the_run_save(tmp_path):
    cloud = Cloud(tmp_path, [])
    cloud.run("stop")
    assert cloud.calls()[-1] == ["sudo", "docker", "stop", "--time=600", "leon"]


@pytest.mark.parametrize("name", ["IMAGE", "SHARE", "ZONE"])
def test_what_has_no_default_is_asked_for(tmp_path, name):
    assert f"{name}: " in Cloud(tmp_path, []).run("create", code=1, **{name: ""})


def test_an_unknown_step_prints_how_to_use_it(tmp_path):
    assert "keep" in Cloud(tmp_path, []).run("rm", code=2)
