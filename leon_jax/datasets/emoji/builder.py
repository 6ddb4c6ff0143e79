"""The emoji designs as a TensorFlow Datasets builder. Needs no TensorFlow.

Imported only when the dataset is made; reading it needs neither this file nor the packages that
the pictures come from.
"""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from leon_jax.data.records import to_png
from leon_jax.datasets.emoji import designs, splits
from leon_jax.datasets.emoji.captions import caption
from leon_jax.datasets.emoji.designs import Design
from leon_jax.datasets.emoji.source import VERSION

Example = dict[str, Any]

_FIELDS = ("key", "caption", "language", "source", "licence", "attribution")


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Two designs of every emoji, with a caption each and two kinds of held-out pictures."""

    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded. Looking for a list of checksums would import importlib_resources,
    # which tensorflow-datasets needs for it but does not install.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        side = designs.SIDE
        picture = tfds.features.Image(shape=(side, side, 3), encoding_format="png")
        fields = {name: tfds.features.Text() for name in _FIELDS}
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji (CC BY-SA 4.0) and Twemoji (CC BY 4.0) drawings with captions.",
            homepage="https://openmoji.org, https://github.com/jdecked/twemoji",
            license="CC-BY-SA-4.0 (OpenMoji), CC-BY-4.0 (Twemoji)",
            features=tfds.features.FeaturesDict({"picture": picture, **fields}),
            # The order of the held-out splits is part of the evaluation.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # everything is inside installed packages
        members = splits.members()
        return {split: self._generate_examples(members[split]) for split in members}

    def _generate_examples(
        self, members: list[tuple[Design, str, str]]
    ) -> Iterator[tuple[int, Example]]:
        for index, (design, concept, language) in enumerate(members):
            yield index, example(design, concept, language)


def example(design: Design, concept: str, language: str) -> Example:
    """One record: PNG bytes and everything that a Document says about them."""
    return {
        "picture": to_png(designs.render(design, concept)),
        "key": f"{design.name}/{concept}",
        "caption": caption(design, concept, language),
        "language": language,
        "source": design.package,
        "licence": design.licence,
        "attribution": design.attribution,
    }
