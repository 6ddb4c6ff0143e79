#!/usr/bin/env python3
"""Runs a distributed training job as several processes on one machine.

    python launch/local.py --processes=2 --devices=4 -- \
        leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

Each process has `--devices` simulated CPU devices. The program adds the flags that connect the
processes. Lines of process 1, 2, ... start with the number. If one process fails, the others are
stopped, the last line names the process that failed first, and this program exits with its code.
SIGTERM and Ctrl-C are forwarded.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# Exit code of `leon train` when another process of its run was lost.
LOST_PEER = 134


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices per process")
    parser.add_argument("command", nargs="+", help="the command of each process")
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
        # A new session, so that Ctrl-C reaches only this program, which forwards it once.
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
        thread.join(timeout=5)  # to print the last lines
    if failure is None:
        return 0
    number, code = failure
    if not stop_requests:
        print(f"local.py: process {number} failed first, with {describe(code)}", file=sys.stderr)
    return code if code > 0 else 128 - code


def free_port() -> int:
    """Returns a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def relay(process: subprocess.Popen, number: int) -> None:
    """Copies a process's stderr; lines of all processes but the first start with the number."""
    prefix = f"[{number}] " if number else ""
    for line in process.stderr:
        sys.stderr.write(prefix + line)
        sys.stderr.flush()


def wait(processes: list[subprocess.Popen]) -> tuple[int, int] | None:
    """Waits for all processes, and stops the others if one fails.

    Returns:
      The number and the exit code of the process that failed first, or None if all succeeded. A
      process that ended because another one was lost counts only if no other process failed.
    """
    failures: dict[int, int] = {}
    deadline = float("inf")
    while True:
        for number, process in enumerate(processes):
            if process.poll() and number not in failures:
                failures[number] = process.returncode
                # The others get 30 seconds to end by themselves, since they may be saving.
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
    """Describes an exit code of `subprocess`, for example `exit code 2` or `signal SIGKILL`.

    Codes above 128 also name the signal, as shells and `leon train` encode it.
    """
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    return f"signal {name}" if code < 0 else f"exit code {code} ({name})"


if __name__ == "__main__":
    sys.exit(main())
