"""Sources whose records have numbers and can be read in any order; a shard is a range of them."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

from leon_jax.data.sources.field_values import Fault, check_text
from leon_jax.data.sources.raw_record import Raw, Reject, SourceConfig


class Numbered(abc.ABC):
    """A source over a sequence that is opened anew in every process.

    A subclass says how the sequence is opened and what its records become.
    """

    def __init__(self, config: SourceConfig):
        self.config = config
        self.split = config.read_split or config.split
        self._rows: Any = self._open()

    @abc.abstractmethod
    def _open(self) -> Any:
        """The sequence; it has `len`, and `_read` knows what else.

        Raises:
          UserError: it is not there, or cannot be read.
        """

    @abc.abstractmethod
    def _read(self, index: int) -> list[Raw | Reject]:
        """What the record `index` becomes; raises a `Fault`, or anything if it is damaged."""

    def shards(self) -> list[str]:
        """The names of all shards, such as `train/10000` for the records from 10,000 on."""
        return [
            f"{self.split}/{start}" for start in range(0, len(self._rows), self.config.shard_size)
        ]

    @abc.abstractmethod
    def version(self, shard: str) -> str:
        """What changes when the records do."""

    def read(self, shard: str) -> Iterator[Raw | Reject]:
        """The records of a shard, in order."""
        start = int(shard.rpartition("/")[2])
        stop = min(start + self.config.shard_size, len(self._rows))
        for index in range(start, stop):
            key = f"{self.split}/{index}"
            try:
                yield from self._read(index)
            except Fault as fault:
                yield fault.reject(key)
            except Exception as error:  # the libraries underneath fail in many ways
                yield Fault("unreadable_record", f"{type(error).__name__}: {error}").reject(key)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._open()


def captions(
    said: dict[str, str], texts: Sequence[str | bytes | None], picture: bytes
) -> list[Raw | Reject]:
    """A record for each caption of one picture; they form a group.

    Args:
      said: attributes of `Raw`, with the key of the picture.
      texts: its captions.
      picture: the encoded picture.

    Raises:
      Fault: there is no caption.
    """
    if not texts:
        raise Fault("no_text", "the list of captions is empty")
    records: list[Raw | Reject] = []
    for number, text in enumerate(texts):
        key = f"{said['key']}/{number}"
        try:
            parts = (check_text(text, "caption"), picture)
            own = {"key": key, "group": said.get("group") or said["key"]}
            records.append(Raw(**{**said, **own}, parts=parts))
        except Fault as fault:
            records.append(fault.reject(key))
    return records
