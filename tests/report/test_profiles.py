"""Tests profiles: traces of steps, and what `leon report` shows of them with xprof."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from leon_jax.cli import main
from leon_jax.report import operations
from leon_jax.train import training_loop
from tests import simulated_devices
from tests.report import traces
from tests.train.test_training_loop import SETTINGS, ToyConfig, ToyProgram, exported_kernel


def profiles(workdir: pathlib.Path) -> dict[str, list[str]]:
    """Returns the names of the files of each profile."""
    folder = workdir / "profiles" / "plugins" / "profile"
    return {path.name: [file.name for file in path.iterdir()] for path in folder.glob("*")}


def page_of(workdir: pathlib.Path) -> str:
    out = workdir.with_name("page")
    assert main.run(("report", str(workdir), f"--out={out}")) == 0
    return (out / "index.html").read_text()


def test_a_profiled_run_has_the_same_parameters_and_its_operations_are_shown(tmp_path):
    settings = dataclasses.replace(SETTINGS, profile=(5, 2))
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path / "plain")
    training_loop.run(ToyProgram(ToyConfig(13)), settings, tmp_path / "run")
    np.testing.assert_array_equal(*(exported_kernel(tmp_path / x) for x in ("plain", "run")))
    assert profiles(tmp_path / "run") == {"step_0000005": ["host_0000.xplane.pb"]}
    files = list((tmp_path / "run" / "profiles").rglob("*.pb"))
    rows = operations.read(files)
    steps = [row.runs for row in rows if row.name.startswith("dot")]
    assert steps and all(runs == 2 for runs in steps), rows
    assert "Profile of run, step_0000005" in page_of(tmp_path / "run")
    assert list((tmp_path / "run" / "profiles").rglob("*.pb")) == files, "xprof writes elsewhere"


def test_a_signal_starts_a_profile_of_the_next_steps(tmp_path, monkeypatch):
    report, sent = training_loop.Metrics.report, []

    def reported(*arguments):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGUSR1))
        report(*arguments)

    monkeypatch.setattr(training_loop.Metrics, "report", reported)
    training_loop.run(ToyProgram(ToyConfig(13)), SETTINGS, tmp_path / "run")
    assert profiles(tmp_path / "run") == {"step_0000004": ["host_0000.xplane.pb"]}
    os.kill(os.getpid(), signal.SIGUSR1)  # after the run it has no effect


def test_a_profile_that_is_longer_than_the_run_ends_with_it(tmp_path):
    settings = dataclasses.replace(SETTINGS, profile=(3, 100))
    training_loop.run(ToyProgram(ToyConfig(5)), settings, tmp_path / "run")
    assert list(profiles(tmp_path / "run")) == ["step_0000003"]


@pytest.mark.parametrize("profile", [(3,), (0, 2), (3, 0)])
def test_a_wrong_profile_is_refused(profile):
    with pytest.raises(ValueError, match="it must be the first step and the number of steps"):
        dataclasses.replace(SETTINGS, profile=profile)


def test_the_operations_of_a_tpu_are_those_of_xprofs_table(tmp_path):
    path = tmp_path / "host_0000.xplane.pb"
    traces.write(
        path,
        [
            ("fusion.1", "loop fusion", 30),
            ("all-gather-start.2", "all-gather", 40),
            ("all-reduce-scatter.4", "reduce scatter fusion", 10),
            ("gemm.3", "convolution", 20),
        ],
    )
    rows = operations.read([path])
    assert [(row.name, row.category) for row in rows] == [
        ("all-gather-start.2", "all-gather"),
        ("fusion.1", "loop fusion"),
        ("gemm.3", "convolution"),
        ("all-reduce-scatter.4", "reduce scatter fusion"),
    ]
    assert [row.seconds for row in rows] == pytest.approx([40e-6, 30e-6, 20e-6, 10e-6])
    assert operations.collective_share(rows) == pytest.approx(0.5)


SHARDED = """
import jax, jax.numpy as jnp, pathlib, sys
from leon_jax import sharding
from leon_jax.train.profiler import Profiler
mesh = sharding.make_mesh((2, 1, 1, 1), jax.devices())
with jax.set_mesh(mesh):
    rows = jax.device_put(jnp.ones((256, 256)), jax.P("data", None))
    total = jax.jit(lambda rows: jnp.sin(rows).sum(0) + 1)
    total(rows).block_until_ready()
    with Profiler(pathlib.Path(sys.argv[1]), (1, 2)) as profiler:
        for step in (1, 2, 3):
            profiler.start(step)
            with profiler.annotated(step):
                outputs = total(rows)
            profiler.end(step, outputs)
"""


def test_collectives_of_simulated_devices_are_counted(tmp_path):
    environment = simulated_devices.environment(2)
    subprocess.run([sys.executable, "-c", SHARDED, str(tmp_path)], env=environment, check=True)
    rows = operations.read(list(tmp_path.rglob("*.pb")))
    (collective,) = [row for row in rows if row.is_collective]
    assert collective.category == "all-reduce" and collective.runs == 4, "two steps, two devices"
    assert 0 < operations.collective_share(rows) < 1


def test_without_xprof_one_sentence_says_so(tmp_path, monkeypatch, capsys):
    settings = dataclasses.replace(SETTINGS, profile=(2, 1))
    training_loop.run(ToyProgram(ToyConfig(3)), settings, tmp_path / "run")
    capsys.readouterr()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "xprof" else find(name)
    )
    assert re.search(
        "since xprof is not installed; run pip install xprof", page_of(tmp_path / "run")
    )
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_profile_has_no_operations(tmp_path):
    path = tmp_path / "host_0000.xplane.pb"
    path.write_bytes(b"\xff" * 100)
    assert operations.read([path]) == []
