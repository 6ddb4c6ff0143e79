"""Kills `leon prepare` at random times and compares its result with an uninterrupted run.

    python -m benchmarks.soak_prepare --kills=10 --data_dir=data/emoji

Prepares the emoji images with the shipped model three times: without interruption in
WORKDIR/whole, with kills at random times in WORKDIR/killed, and on Apache Beam in WORKDIR/beam. All
three folders must have the same bytes.
"""

import hashlib
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags

_KILLS = flags.DEFINE_integer("kills", 10, "Number of kills.", 1)
_DATA = flags.DEFINE_string(
    "data_dir", "data/emoji", "The folder of emoji images; rendered if missing."
)
_WORKDIR = flags.DEFINE_string("workdir", "out/soak_prepare", "The parent of the three folders.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the times of the kills.")
_SHARD = flags.DEFINE_integer("shard_size", 500, "Documents per shard.")


def config(path: pathlib.Path) -> None:
    """Writes a config that prepares the emoji in small shards and drops duplicates."""
    splits = ("train", "unseen_design", "unseen_concept")
    sources = [
        {"kind": "emoji", "path": _DATA.value, "split": split, "shard_size": _SHARD.value}
        for split in splits
    ]
    values = {
        "sources": sources,
        "picture_side": 96,
        "duplicates": {"near": 0.999, "evaluation": 0.999},
    }
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({values!r})\n"
    )


def main(argv: list[str]) -> None:
    """Runs `leon prepare` three times and compares the folders."""
    del argv
    work = pathlib.Path(_WORKDIR.value)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config(work / "prepare.py")

    def start(name: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "leon_jax.cli.main", "prepare", *more,
                   f"--config={work / 'prepare.py'}", f"--out={work / name}"]  # fmt: skip
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    start_time = time.monotonic()
    if start("whole").wait():
        raise SystemExit("the uninterrupted run failed")
    duration = time.monotonic() - start_time
    expected = digests(work / "whole")
    print(f"uninterrupted: {duration:.0f} s, {len(expected)} files")

    rng, kills, starts = random.Random(_SEED.value), 0, 0
    start_time = time.monotonic()
    while True:
        process, starts = start("killed"), starts + 1
        try:
            # Every start resumes, so only the remaining work takes time.
            code = process.wait(rng.uniform(0.1, 0.5) * duration if kills < _KILLS.value else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if code:
            raise SystemExit(f"start {starts} failed")
        if kills >= _KILLS.value:
            break
        # Finished before all kills were used; start again from nothing.
        compare(work / "killed", expected)
        shutil.rmtree(work / "killed")
    compare(work / "killed", expected)
    elapsed = time.monotonic() - start_time
    print(f"killed {kills} times in {starts} starts, {elapsed:.0f} s in total: the same bytes")

    if start("beam", "--runner=DirectRunner").wait():
        raise SystemExit("the run on Beam failed")
    compare(work / "beam", expected)
    print("Apache Beam, DirectRunner: the same bytes")


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compare(folder: pathlib.Path, expected: dict[str, str]) -> None:
    """Exits with an error if the files in a folder differ from the expected ones."""
    actual = digests(folder)
    different = sorted(
        name for name in expected.keys() | actual if expected.get(name) != actual.get(name)
    )
    if different:
        raise SystemExit(f"{folder} differs in {len(different)} files: {', '.join(different[:5])}")


if __name__ == "__main__":
    app.run(main)
