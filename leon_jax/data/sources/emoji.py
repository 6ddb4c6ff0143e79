"""The emoji designs (`leon_jax.data.emoji`) as a source; they are drawn if they are not there."""

from leon_jax.data import emoji
from leon_jax.data.sources.numbered import Numbered
from leon_jax.data.sources.raw import Raw, Reject, SourceConfig


class Emoji(Numbered):
    """A source of one split of the emoji designs in the folder `path`.

    Raises:
      UserError: there is no such split, or the designs cannot be drawn or read.
    """

    def __init__(self, config: SourceConfig):
        emoji.prepare(config.path)
        super().__init__(config)

    def version(self, shard: str) -> str:
        """Of the drawings; it goes up with any change of them."""
        return emoji.VERSION

    def _open(self) -> emoji.EmojiSource:
        return emoji.EmojiSource(self.split, self.config.path)

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
