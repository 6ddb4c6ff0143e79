"""Fakes SLURM's `srun`: starts the tasks of a step on this machine and sets their variables.

Accepts only the options that launch/slurm.sbatch uses. Forwards SIGTERM, and exits with the highest
exit code of the tasks, as the real `srun` does. Writes its process id to $FAKE_SLURM/srun.pid.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys

HOST = "127.0.0.1"


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kill-on-bad-exit", type=int, choices=(0, 1))
    parser.add_argument("--wait", type=int)
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    tasks = []
    for number in range(int(os.environ["SLURM_NTASKS"])):
        task = {
            "SLURM_STEP_NODELIST": HOST,
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
        }
        tasks.append(subprocess.Popen(arguments.command, env=os.environ | task))
    signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
    pathlib.Path(os.environ["FAKE_SLURM"], "srun.pid").write_text(str(os.getpid()))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
