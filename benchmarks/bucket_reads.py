"""Measures reading records of a bucket at random: directly, or from a copy on the disk.

    python -m benchmarks.bucket_reads --records=2000 --delay=0.05

A Cloud Storage server runs on this machine, behind a proxy that delays every answer. ArrayRecord
reads the bucket itself. The copy is made by `leon_jax.storage.local`. The last line is what a
decoder's batch of 8 documents with 2 retrieved documents each takes.
"""

import argparse
import os
import pathlib
import tempfile
import time

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from leon_jax import storage
from tests import buckets
from tests.bucket_proxy import proxy

_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BATCH = 24


def seconds_for(path: str, rows: list[int], at_once: int) -> float:
    """Returns the seconds to open a file and read records, `at_once` in each call."""
    start = time.perf_counter()
    reader = ArrayRecordReader(path, options=_OPTIONS)
    opened = time.perf_counter()
    for first in range(0, len(rows), at_once):
        reader.read(rows[first : first + at_once])
    print(f"  open {opened - start:.2f} s", end="")
    reader.close()
    return time.perf_counter() - opened


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=2000, help="number of records")
    parser.add_argument("--bytes", type=int, default=4000, help="size of a record")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        buckets.cloud_storage(pathlib.Path(folder)) as url,
    ):
        local = pathlib.Path(folder, "data.array_record")
        writer = ArrayRecordWriter(str(local), "group_size:1")
        for _ in range(arguments.records):
            writer.write(rng.bytes(arguments.bytes))
        writer.close()
        os.environ |= buckets.cloud_storage_environment(url) | {"LEON_CACHE": f"{folder}/cache"}
        address = storage.path("gs://bucket/data.array_record")
        with storage.writing(address) as temporary:
            temporary.write_bytes(local.read_bytes())
        requests = []

        def slow(number: int, request: str) -> float:
            requests.append(request)
            return arguments.delay

        rows = rng.permutation(arguments.records)[: 10 * _BATCH].tolist()
        with proxy(url, slow) as slow_url:
            os.environ |= buckets.cloud_storage_environment(slow_url)
            os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = slow_url
            for name, at_once in (("one at a time", 1), (f"{_BATCH} at once", _BATCH)):
                requests.clear()
                print(f"directly, {name}:", end="")
                seconds = seconds_for(str(address), rows, at_once)
                print(f", {1000 * seconds / 10:.0f} ms a batch, {len(requests)} requests")
            requests.clear()
            start = time.perf_counter()
            copy = storage.local(address)
            print(f"copy: {time.perf_counter() - start:.2f} s, {len(requests)} requests")
            print("from the copy, one at a time:", end="")
            print(f", {1000 * seconds_for(str(copy), rows, 1) / 10:.2f} ms a batch")


if __name__ == "__main__":
    main()
