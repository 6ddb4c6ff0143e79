"""The emoji data set as a source of `leon prepare`, of kind `emoji`."""

from leon_jax.data.sources.random_access import Numbered
from leon_jax.data.sources.raw_record import Raw, Reject, SourceConfig
from leon_jax.datasets.emoji.make import make
from leon_jax.datasets.emoji.source import VERSION, EmojiSource


class EmojiShards(Numbered):
    """One split of the data set in the folder `path`, which is drawn if it is not there.

    Raises:
      UserError: there is no such split, or the data set cannot be drawn or read.
    """

    def __init__(self, config: SourceConfig):
        make(config.path)
        super().__init__(config)

    def version(self, shard: str) -> str:
        """Of the drawings; it goes up with any change of them."""
        return VERSION

    def _open(self) -> EmojiSource:
        return EmojiSource(self.split, self.config.path)

    def _read(self, index: int) -> list[Raw | Reject]:
        text, png, provenance = self._rows.stored(index)
        return [
            Raw(
                key=provenance.key,
                parts=(text, png),
                licence=provenance.licence,
                attribution=provenance.attribution,
                language=provenance.language,
                origin=provenance.source,
                group=provenance.group,
            )
        ]
