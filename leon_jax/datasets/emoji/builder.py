"""A TensorFlow Datasets builder of the emoji dataset. It needs no TensorFlow.

It is imported only to render the dataset. Reading the dataset needs neither this module nor the
packages with the drawings.
"""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from leon_jax.data.records import to_png
from leon_jax.datasets.emoji import designs, splits
from leon_jax.datasets.emoji.captions import caption
from leon_jax.datasets.emoji.designs import PyPIDesign
from leon_jax.datasets.emoji.source import VERSION

Example = dict[str, Any]

_FIELDS = ("key", "caption", "language", "source", "licence", "attribution")


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Two captioned designs of every emoji, with two held-out splits."""

    VERSION = tfds.core.Version(VERSION)
    # There are no downloads. The search for their checksums would import importlib_resources,
    # which tensorflow-datasets does not install.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        side = designs.SIDE
        image = tfds.features.Image(shape=(side, side, 3), encoding_format="png")
        fields = {name: tfds.features.Text() for name in _FIELDS}
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji (CC BY-SA 4.0) and Twemoji (CC BY 4.0) drawings with captions.",
            homepage="https://openmoji.org, https://github.com/jdecked/twemoji",
            license="CC-BY-SA-4.0 (OpenMoji), CC-BY-4.0 (Twemoji)",
            features=tfds.features.FeaturesDict({"picture": image, **fields}),
            # The evaluation depends on the order of the held-out splits.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # all files come from installed packages
        members = splits.members()
        return {split: self._generate_examples(members[split]) for split in members}

    def _generate_examples(
        self, members: list[tuple[PyPIDesign, str, str]]
    ) -> Iterator[tuple[int, Example]]:
        for index, (design, concept, language) in enumerate(members):
            yield index, example(design, concept, language)


def example(design: PyPIDesign, concept: str, language: str) -> Example:
    """Returns a record: the image as PNG, the caption and the provenance."""
    return {
        "picture": to_png(designs.render(design, concept)),
        "key": f"{design.name}/{concept}",
        "caption": caption(design, concept, language),
        "language": language,
        "source": design.package,
        "licence": design.licence,
        "attribution": design.attribution,
    }
