"""Kills `leon prepare` at random and compares what it leaves in the end with an unbroken run.

    python -m benchmarks.soak_prepare --kills=10 --data_dir=data/emoji

Prepares the emoji drawings with the bundled models into WORKDIR/whole, then into WORKDIR/killed,
where the process gets SIGKILL after a random share of the time that the unbroken run took, again
and again; then once more on Apache Beam. All three folders must hold the same bytes.
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

_KILLS = flags.DEFINE_integer("kills", 10, "How often the process is killed.", 1)
_DATA = flags.DEFINE_string("data_dir", "data/emoji", "The emoji drawings; made if missing.")
_WORKDIR = flags.DEFINE_string("workdir", "out/soak_prepare", "Where the folders go.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides when.")
_SHARD = flags.DEFINE_integer("shard_size", 500, "Documents a shard.")


def config(path: pathlib.Path) -> None:
    """Writes a config that prepares the drawings in small shards, dropping copies."""
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
    """Runs the three and prints what was compared."""
    del argv
    work = pathlib.Path(_WORKDIR.value)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config(work / "prepare.py")

    def start(name: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "leon_jax.cli.main", "prepare", *more,
                   f"--config={work / 'prepare.py'}", f"--out={work / name}"]  # fmt: skip
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    began = time.monotonic()
    if start("whole").wait():
        raise SystemExit("the unbroken run failed")
    whole = time.monotonic() - began
    expected = digests(work / "whole")
    print(f"unbroken: {whole:.0f} s, {len(expected)} files")

    rng, killed, starts = random.Random(_SEED.value), 0, 0
    began = time.monotonic()
    while True:
        process, starts = start("killed"), starts + 1
        try:
            # Starting takes a while; each start then does only what is left.
            code = process.wait(rng.uniform(0.1, 0.5) * whole if killed < _KILLS.value else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        if code:
            raise SystemExit(f"start {starts} failed")
        if killed >= _KILLS.value:
            break
        # Done before the kills were used up: begin anew.
        compare(work / "killed", expected)
        shutil.rmtree(work / "killed")
    compare(work / "killed", expected)
    took = time.monotonic() - began
    print(f"killed {killed} times in {starts} starts, {took:.0f} s in all: the same bytes")

    if start("beam", "--runner=DirectRunner").wait():
        raise SystemExit("the run on Beam failed")
    compare(work / "beam", expected)
    print("Apache Beam, DirectRunner: the same bytes")


def digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compare(folder: pathlib.Path, expected: dict[str, str]) -> None:
    """Ends the program if a folder does not hold what is expected."""
    found = digests(folder)
    wrong = sorted(
        name for name in expected.keys() | found if expected.get(name) != found.get(name)
    )
    if wrong:
        raise SystemExit(f"{folder} differs in {len(wrong)} files: {', '.join(wrong[:5])}")


if __name__ == "__main__":
    app.run(main)
