"""Times reading the decoder's training data as the training loop does (Linux)."""

import contextlib
import dataclasses
import os
import pathlib
import runpy
import time

import numpy as np

from benchmarks.stopwatch import Stopwatch
from leon_jax import config as configuration
from leon_jax.data import document_folder, examples, records
from leon_jax.documents import Document
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import decoder_data
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALLOWED = sorted(os.sched_getaffinity(0))
HOSTS = 64  # one host reads 32 of the 2,048 rows of a batch
STAGES = {
    "read record": "ArrayRecord, from memory",
    "unpack": "msgpack to a `Document`",
    "encode text": "byte-level BPE of the caption",
    "to ids": "caption and codes to one array",
    "neighbours": "two of the best two of each modality",
    "join": "retrieved documents before the query",
    "mask": "spans, sentinels, tail",
    "example": "random choices, positions, targets",
    "order": "shuffling, mixture, random state",
    "pack": "best fit into 128 rows",
    "batch": "32 rows to one array",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of a measurement.

    Attributes:
      records: "codes", or "pictures" for records that also have the image as PNG.
      retrieved: documents retrieved for every query.
      packing, threads: as in `leon_jax.data.config.DataConfig`.
      cores: number of cores that the process may use.
      delay: additional seconds of reading a record.
      cold: whether the records are only on disk when a measurement starts.
    """

    records: str = "codes"
    retrieved: int = 2
    packing: str = "whole"
    threads: int = 0
    cores: int = 1
    delay: float = 0.0
    cold: bool = False


class DelayedRecords(records.RecordSource):
    """Records with a delay, as from slow storage."""

    delay = 0.0

    def __getitem__(self, index: int) -> Document:
        if self.delay:
            time.sleep(self.delay)
        return super().__getitem__(index)


class Reader:
    """Reads and times the batches of a case.

    Args:
      folder: the folder that `benchmarks.input_data.write` wrote.
      case: the settings.
    """

    def __init__(self, folder: pathlib.Path, case: Case) -> None:
        self.case, self._folder = case, folder
        config = runpy.run_path(str(ROOT / "configs" / "cm3leon_350m.py"))["get_config"]().to_dict()
        del config["loop"]
        config["data"] |= {
            "folder": str(folder / case.records),
            "text": str(folder / "text.json"),
            "retrieved": (0.0,) * case.retrieved + (1.0,),
            "packing": case.packing,
            "threads": case.threads,
        }
        self.program = DecoderProgram(configuration.build(DecoderTraining, config))
        pin(case.cores)
        document_folder.RecordSource = DelayedRecords  # type: ignore[misc]
        DelayedRecords.delay = case.delay
        self._batches = iter(self.program.batches(0, HOSTS))
        # So many batches are filled in parallel, so only whole turns are timed.
        self._turn = self.program.config.data.packing_bins
        self._read()

    def close(self) -> None:
        """Stops the reading threads."""
        self._batches.close()

    def file(self, name: str) -> pathlib.Path:
        """Returns the record file of "codes" or "pictures"."""
        (path,) = PreparedFolder(self._folder / name).paths("train", "array_record")
        return path

    @property
    def tokens(self) -> float:
        """The mean number of tokens in a document."""
        source = records.RecordSource(self.file("codes"))
        return float(np.mean([len(self.program.documents.encode(source[i])) for i in range(500)]))

    def speed(self, seconds: float) -> tuple[float, float, float]:
        """Returns tokens per second, the share of padding, and the number of busy cores."""
        if self.case.cold:
            with open(self.file(self.case.records), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        tokens = positions = 0
        start, cpu_start = time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - start) < seconds:
            segments = self._read()
            tokens, positions = tokens + int((segments > 0).sum()), positions + segments.size
        busy_cores = (time.process_time() - cpu_start) / elapsed
        return tokens / elapsed, 1 - tokens / positions, busy_cores

    def stages(self, turns: int) -> dict[str, float]:
        """Returns microseconds per example by stage, without threads, over `turns` turns."""
        with Stopwatch() as watch:
            chain = [self._batches]
            while chain[-1]._parents:  # Grain has no public way to get the packing iterator
                chain.append(chain[-1]._parents[0])
            for iterator in chain:
                stage = "batch" if iterator is chain[0] else "pack"
                stage = "order" if iterator is chain[-1] else stage
                watch.time(type(iterator), "__next__", stage)
            watch.time(examples.MakeExample, "__call__", "example")
            watch.time(records.RecordSource, "__getitem__", "read record")
            watch.time(records, "from_bytes", "unpack")
            watch.time(TextTokenizer, "encode", "encode text")
            watch.time(DocumentTokenizer, "encode", "to ids")
            watch.time(decoder_data, "sample_neighbours", "neighbours")
            watch.time(examples, "join", "join")
            watch.time(examples, "mask", "mask")
            count = sum(int(self._read().max(axis=1).sum()) for _ in range(turns))
        return {stage: 1e6 * watch.seconds[stage] / count for stage in STAGES}

    def _read(self) -> np.ndarray:
        """Returns the segment ids of the batches of one turn."""
        return np.concatenate([next(self._batches)["segment_ids"] for _ in range(self._turn)])


def pin(cores: int) -> None:
    """Pins all threads of this process, and later ones, to its last `cores` cores."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # the thread may have ended
            os.sched_setaffinity(int(thread), ALLOWED[-cores:])
