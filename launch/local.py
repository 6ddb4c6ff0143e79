#!/usr/bin/env python3
"""A run of several processes on one machine, over loopback, as a pod would run it.

    python launch/local.py --processes=2 --devices=4 -- \
        leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

Each process sees `--devices` simulated CPU devices; flags that tell the processes of each other are
added to the command. Lines of process 1, 2, ... are marked. If one process fails the others are
ended; the last line says which one failed first, and its exit code is this program's. SIGTERM and
Ctrl-C are passed on.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# How `leon train` ends when another process of its run was lost.
LOST_PEER = 134


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="how many processes")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each")
    parser.add_argument("command", nargs="+", help="what each of them runs")
    arguments = parser.parse_args()
    if arguments.processes < 1 or arguments.devices < 1:
        parser.error("--processes and --devices must be at least 1")

    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    flags = environment.get("XLA_FLAGS", "")
    devices = f"--xla_force_host_platform_device_count={arguments.devices}"
    environment["XLA_FLAGS"] = f"{flags} {devices}".strip()
    coordinator = f"127.0.0.1:{free_port()}"
    processes, relays = [], []
    for number in range(arguments.processes):
        command = [
            *arguments.command, "--distributed", f"--coordinator={coordinator}",
            f"--processes={arguments.processes}", f"--process_id={number}",
        ]  # fmt: skip
        # In sessions of their own: Ctrl-C is for this program, which passes it on once.
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        relays.append(threading.Thread(target=relay, args=(process, number), daemon=True))
        relays[-1].start()
        processes.append(process)
    stop_requests = []

    def stop(number: int, frame: object) -> None:
        stop_requests.append(number)
        for process in processes:
            process.send_signal(signal.SIGTERM)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    failure = wait(processes)
    for thread in relays:
        thread.join(timeout=5)  # for the last lines
    if failure is None:
        return 0
    number, code = failure
    if not stop_requests:
        print(f"local.py: process {number} failed first, with {describe(code)}", file=sys.stderr)
    return code if code > 0 else 128 - code


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def relay(process: subprocess.Popen, number: int) -> None:
    """Copies what a process says on stderr; all but the first are marked."""
    mark = f"[{number}] " if number else ""
    for line in process.stderr:
        sys.stderr.write(mark + line)
        sys.stderr.flush()


def wait(processes: list[subprocess.Popen]) -> tuple[int, int] | None:
    """Waits for the end of all processes, and ends the others when one fails.

    Returns:
      The number and the exit code of the process that failed first; None if none did. A process
      that ended because another one was lost counts only if there is no other.
    """
    failures: dict[int, int] = {}
    deadline = float("inf")
    while True:
        for number, process in enumerate(processes):
            if process.poll() and number not in failures:
                failures[number] = process.returncode
                # A moment for the others to end by themselves: they may be saving.
                deadline = min(deadline, time.monotonic() + 30)
        if all(process.returncode is not None for process in processes):
            break
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            break
        time.sleep(0.05)
    causes = [number for number, code in failures.items() if code != LOST_PEER]
    first = next(iter(causes or failures), None)
    return None if first is None else (first, failures[first])


def describe(code: int) -> str:
    """An exit code as `subprocess` gives it, in words: `exit code 2`, `signal SIGKILL`.

    Codes above 128 are those that shells, and `leon train`, give to a signal.
    """
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    return f"signal {name}" if code < 0 else f"exit code {code} ({name})"


if __name__ == "__main__":
    sys.exit(main())
