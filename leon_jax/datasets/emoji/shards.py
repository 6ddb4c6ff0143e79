"""The emoji dataset as a source of `leon prepare`, of the kind `emoji`."""

from leon_jax.data.sources.random_access import IndexedSource
from leon_jax.data.sources.raw_record import RawRecord, Reject, SourceConfig
from leon_jax.datasets.emoji.make import make
from leon_jax.datasets.emoji.source import VERSION, EmojiSource

# Increase it when the fields of a record change, but the rendered dataset does not.
_RECORDS = 2


class EmojiShards(IndexedSource):
    """A split of the dataset in the folder `path`; a missing dataset is rendered first.

    Raises:
      UserError: the split does not exist, or the dataset cannot be rendered or read.
    """

    def __init__(self, config: SourceConfig):
        make(config.path)
        super().__init__(config)

    def version(self, shard: str) -> str:
        """Returns the versions of the dataset and of its records."""
        return f"{VERSION}-{_RECORDS}"

    def _open(self) -> EmojiSource:
        return EmojiSource(self.split, self.config.path)

    def _read(self, index: int) -> list[RawRecord | Reject]:
        text, png, provenance = self._rows.stored(index)
        return [
            RawRecord(
                key=provenance.key,
                parts=(text, png),
                licence=provenance.licence,
                attribution=provenance.attribution,
                language=provenance.language,
                origin=provenance.source,
                group=provenance.group,
                family=provenance.family,
                captions=provenance.captions,
            )
        ]
