"""Reads a source with limited memory under an audit hook, and prints the results as JSON.

python read_hostile.py KIND PATH prints the outcomes as (key, reason or None), the growth of memory
in MiB, and the audit events of writing, running programs and connecting.
"""

import json
import os
import resource
import sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Prefixes of audit events with side effects.
SIDE_EFFECTS = ("os.", "shutil.", "subprocess.", "socket.", "tempfile.", "ctypes.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr")


def main(kind: str, path: str) -> None:
    from leon_jax.data.sources.open import open_source
    from leon_jax.data.sources.raw_record import Reject, SourceConfig

    events = []

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            events.append(f"{event} {arguments[0]!r}")
        elif event.startswith(SIDE_EFFECTS) and event not in HARMLESS:
            events.append(f"{event} {arguments!r}")

    # A header that claims 8 GiB must not cause their allocation.
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
    source = open_source(SourceConfig(kind, path, shard_size=500))
    sys.addaudithook(watch)
    before = peak()
    outcomes = [
        (outcome.key, outcome.reason if isinstance(outcome, Reject) else None)
        for shard in source.shards()
        for outcome in source.read(shard)
    ]
    print(json.dumps({"outcomes": outcomes, "growth": peak() - before, "events": events}))


def peak() -> float:
    """The peak memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main(*sys.argv[1:])
