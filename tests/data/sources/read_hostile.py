"""Reads a source with its memory limited and its doings watched; prints what came of it.

python read_hostile.py KIND PATH: outcomes as (key, reason or None), how far memory grew in MiB,
and whatever was written, run or connected to.
"""

import json
import os
import resource
import sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events by which a program changes something or reaches out, by their first words.
ACTS = ("os.", "shutil.", "subprocess.", "socket.", "tempfile.", "ctypes.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr")


def main(kind: str, path: str) -> None:
    from leon_jax.data.sources.open import open_source
    from leon_jax.data.sources.raw_record import Reject, SourceConfig

    acts = []

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            acts.append(f"{event} {arguments[0]!r}")
        elif event.startswith(ACTS) and event not in HARMLESS:
            acts.append(f"{event} {arguments!r}")

    # A header that claims 8 GiB must not get them.
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
    source = open_source(SourceConfig(kind, path, shard_size=500))
    sys.addaudithook(watch)
    before = peak()
    outcomes = [
        (outcome.key, outcome.reason if isinstance(outcome, Reject) else None)
        for shard in source.shards()
        for outcome in source.read(shard)
    ]
    print(json.dumps({"outcomes": outcomes, "grown": peak() - before, "acts": acts}))


def peak() -> float:
    """The most memory that was held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main(*sys.argv[1:])
