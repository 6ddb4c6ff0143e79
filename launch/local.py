#!/usr/bin/env python3
"""A run of several processes on one machine, over loopback, as a pod would run it.

    python launch/local.py --processes=2 --devices=4 -- \
        leon train --config=configs/emoji/decoder.py --workdir=runs/emoji/decoder

Each process sees `--devices` simulated CPU devices; flags that tell the processes of each other are
added to the command. Lines of process 1, 2, ... are marked. If one process fails the others are
ended, and its exit code is this program's. SIGTERM and Ctrl-C are passed on.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time


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
    running = []
    for number in range(arguments.processes):
        command = [
            *arguments.command, "--distributed", f"--coordinator={coordinator}",
            f"--processes={arguments.processes}", f"--process_id={number}",
        ]  # fmt: skip
        # In sessions of their own: Ctrl-C is for this program, which passes it on once.
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        threading.Thread(target=relay, args=(process, number), daemon=True).start()
        running.append(process)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: [p.send_signal(signal.SIGTERM) for p in running])
    return wait(running)


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


def wait(running: list[subprocess.Popen]) -> int:
    """The exit code of the first process that fails, after ending the others; else 0."""
    while True:
        codes = [process.poll() for process in running]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            # A moment for the others to end by themselves: they may be saving.
            until = time.monotonic() + 30
            while time.monotonic() < until and any(p.poll() is None for p in running):
                time.sleep(0.1)
            for process in running:
                process.kill()
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            time.sleep(0.2)  # for the last lines
            return 0
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
