"""Tests the supervisor of a distributed run: explanations, signals and exit codes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.train.test_decoder_program import write_data

ROOT = pathlib.Path(__file__).parents[2]

PARENT = """
import sys
from leon_jax.train import supervisor
child = [sys.executable, "-u", "-c", sys.argv[1], *sys.argv[2:]]
sys.exit(supervisor.supervise(child, {"ended by a peer": "The explanation.", "never met": "No."}))
"""

# A child that writes its process id to a file, then waits.
WAITING = """
import os, pathlib, signal, sys, time
from leon_jax.train import supervisor
assert supervisor.is_child() and not supervisor.is_child()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
pathlib.Path(sys.argv[1] + ".new").write_text(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
while True: time.sleep(0.05)
"""


def start(child: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, child, *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process_id: int) -> bool:
    """Returns whether a process is running; a zombie is not."""
    try:
        status = pathlib.Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(") ")[2][0] != "Z"


@pytest.mark.parametrize(
    ("end", "code"),
    [("sys.exit(0)", 0), ("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_output_and_exit_code_are_those_of_the_child(end, code):
    child = f"import os, signal, sys; print('out'); print('err', file=sys.stderr); {end}"
    process = start(child)
    assert process.communicate() == ("out\n", "err\n")
    assert process.returncode == code


@pytest.mark.parametrize("end", ["os.abort()", "sys.exit(1)"])
def test_the_explanation_of_a_lost_peer_comes_last(end):
    """The text is recognised even if the child writes it in pieces."""
    child = (
        "import os, sys, time\n"
        "for piece in ('x' * 100_000 + 'ended', ' by a ', 'peer\\n*** stack ***\\n'):\n"
        "    sys.stderr.write(piece); sys.stderr.flush(); time.sleep(0.1)\n"
    )
    process = start(child + end)
    errors = process.communicate()[1]
    assert process.returncode == 134
    assert errors.endswith("ended by a peer\n*** stack ***\nThe explanation.\n")


def test_another_exit_code_of_the_child_is_not_explained():
    process = start("import sys; print('ended by a peer: so what', file=sys.stderr); sys.exit(2)")
    assert "The explanation" not in process.communicate()[1]
    assert process.returncode == 2


def test_signals_are_forwarded_to_the_child(tmp_path):
    process = start(WAITING, str(tmp_path / "child"))
    wait_until((tmp_path / "child").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 7


def test_the_signal_for_a_profile_reaches_a_child_that_handles_it_and_ends_no_other(tmp_path):
    handled = WAITING.replace("signal.SIGTERM, ", "signal.SIGUSR1, ")
    for name, child in (("ignores", WAITING), ("handles", handled)):
        process = start(child, str(tmp_path / name))
        wait_until((tmp_path / name).exists)
        process.send_signal(signal.SIGUSR1)
        if name == "ignores":
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 7


def test_the_child_exits_when_its_parent_is_killed(tmp_path):
    process = start(WAITING, str(tmp_path / "child"))
    wait_until((tmp_path / "child").exists)
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    process.kill()
    process.communicate()
    wait_until(lambda: not is_alive(child), 10)


CONFIG = """
import pathlib
from tests.train import test_decoder_program

def get_config():
    config = test_decoder_program.make_config(pathlib.Path({folder!r}))
    config.steps = config.optimizer.total_steps = 1_000_000
    config.samples.image = ""
    config.model.layers = 1
    config.loop = dict(log_every=1, mesh=(2, 1, 1, 1), data_shards=2)
    return config
"""


@pytest.fixture
def start_pair(tmp_path):
    """Returns a function that starts two processes of one run; both are killed at the end."""
    write_data(tmp_path / "data")
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path / "data")))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    processes: list[subprocess.Popen] = []

    def start(*flags_of_second: str) -> list[subprocess.Popen]:
        for number, flags in enumerate([(), flags_of_second]):
            command = [
                sys.executable, "-m", "leon_jax.cli.main", "train",
                f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}",
                "--distributed", f"--coordinator={coordinator}", "--processes=2",
                f"--process_id={number}", "--heartbeat_seconds=4", *flags,
            ]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
                )
            )
        return processes

    yield start
    for process in processes:
        process.kill()
        process.wait()


def assert_ended_by_a_peer(process: subprocess.Popen) -> None:
    # Less than JAX's default of 100 s, and more than the heartbeat, for a busy machine.
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 134, errors
    last_line = errors.splitlines()[-1]
    assert last_line.startswith(
        "leon train: another process of this run failed or sent no heartbeat for 4"
    )
    assert "start all of them again" in last_line


def test_when_one_process_is_killed_the_other_exits_with_one_sentence(start_pair, tmp_path):
    first, second = start_pair()
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"step": 1,' in metrics.read_text())
    second.kill()
    assert_ended_by_a_peer(first)


def test_an_error_of_one_process_is_its_last_line_and_ends_the_other(start_pair):
    """The failed process does not wait for the other, which waits for it in a collective."""
    first, second = start_pair("--config.data.folder=nowhere")
    errors = second.communicate(timeout=120)[1]
    assert second.returncode == 2, errors
    assert errors.splitlines()[-1].startswith("leon train: config.data: nowhere is not")
    assert_ended_by_a_peer(first)
