"""One side of benchmarks/mining.py: searches an index on request and reports its peak memory."""

import argparse
import pathlib
import threading
import time

import numpy as np

from benchmarks.turns import serve


class Memory(threading.Thread):
    """Measures the peak memory of this process (Linux).

    RssAnon is the allocated memory. Pages of mapped files (RssFile) are separate: they belong to
    the system's cache, which releases them when other programs need memory. The kernel records the
    peak of both together (VmHWM). The peak of RssAnon is sampled every 5 ms.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = 0
        self.start()

    def run(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, _status("RssAnon"))
            time.sleep(0.005)

    def peak(self) -> dict[str, int]:
        """Returns the peaks in bytes."""
        return {"anonymous": self.anonymous, "resident": _status("VmHWM")}


def _status(name: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class Ours:
    """Searches files with `VectorIndex`."""

    def __init__(self, files: list[str], approximate: bool) -> None:
        import jax

        from leon_jax import sharding
        from leon_jax.retrieval.vector_index import VectorIndex

        jax.set_mesh(sharding.make_mesh())
        self._index, self._approximate = VectorIndex.open(files), approximate

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self._index.search(queries, k, approximate=self._approximate)[1]


class Faiss:
    """Searches a flat FAISS index that `leon_jax.retrieval.faiss_export` wrote."""

    def __init__(self, files: list[str]) -> None:
        import faiss

        (file,) = files
        self._index = faiss.read_index(file)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self._index.search(queries, k)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("exact", "approximate", "faiss"))
    parser.add_argument("queries", help="a .npy file")
    parser.add_argument("files", nargs="+", help="the shards, or FAISS's index")
    parser.add_argument("--k", type=int, default=20)
    arguments = parser.parse_args()
    memory = Memory()
    side = (
        Faiss(arguments.files)
        if arguments.side == "faiss"
        else Ours(arguments.files, arguments.side == "approximate")
    )

    def search(count: int, out: str) -> float:
        queries = np.load(arguments.queries)[:count]
        start = time.perf_counter()
        ids = side.search(queries, arguments.k)
        seconds = time.perf_counter() - start
        if out:
            np.save(out, ids)
        return seconds

    serve({"search": search, "peak": memory.peak})


if __name__ == "__main__":
    main()
