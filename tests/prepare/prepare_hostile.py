"""Prepares hostile corpora, in which few records are valid, and prints the results as JSON.

python prepare_hostile.py OUT KIND=PATH ... uses tiny models. It prints the manifest, `after` (the
peak memory in MiB) and `before` (the peak memory before preparing).
"""

import json
import resource
import sys

from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.prepare import prepare as preparing
from tests import tiny


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(out: str, *sources: str) -> None:
    checkpoint, _ = tiny.folders()
    before = peak()
    configs = tuple(
        SourceConfig(kind, path, licence="CC0-1.0", shard_size=500)
        for kind, _, path in (source.partition("=") for source in sources)
    )
    config, _ = tiny.preparation(checkpoint, {}, sources=configs, min_side=32, max_aspect=4.0)
    manifest = preparing.prepare(config, out, progress=False)
    print(json.dumps({"manifest": manifest, "after": peak(), "before": before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
