"""Sources with random access to their records; a shard is a range of indices."""

import abc
from collections.abc import Iterator
from typing import Any

from leon_jax.data.sources.field_values import RecordError
from leon_jax.data.sources.raw_record import RawRecord, Reject, SourceConfig


class IndexedSource(abc.ABC):
    """A source over a sequence of rows. Every process opens the sequence again.

    A subclass opens the sequence and converts its rows.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.split = config.read_split or config.split or "train"
        self._rows: Any = self._open()

    @abc.abstractmethod
    def _open(self) -> Any:
        """Opens the sequence of rows, which has a `len`.

        Raises:
          UserError: the dataset does not exist, or cannot be read.
        """

    @abc.abstractmethod
    def _read(self, index: int) -> list[RawRecord | Reject]:
        """Converts row `index` into records. A damaged row may raise any exception."""

    def shards(self) -> list[str]:
        """Returns the names of all shards, e.g. `train/10000` for the rows from 10,000 on."""
        return [
            f"{self.split}/{start}" for start in range(0, len(self._rows), self.config.shard_size)
        ]

    @abc.abstractmethod
    def version(self, shard: str) -> str:
        """Returns a string that changes with the records."""

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the records of a shard, in order."""
        start = int(shard.rpartition("/")[2])
        stop = min(start + self.config.shard_size, len(self._rows))
        for index in range(start, stop):
            key = f"{self.split}/{index}"
            try:
                yield from self._read(index)
            except RecordError as error:
                yield error.reject(key)
            except Exception as error:  # the libraries raise many kinds of exceptions
                detail = f"{type(error).__name__}: {error}"
                yield RecordError("unreadable_record", detail).reject(key)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._open()
