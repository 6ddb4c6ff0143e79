"""Reads datasets of Hugging Face's `datasets` library, from a folder or by name.

No code of a dataset is executed, because the library no longer supports loading scripts. Encoded
images are read as they are stored.
"""

import os
from collections.abc import Sequence
from typing import Any

import datasets

from leon_jax.config import UserError
from leon_jax.data.sources import field_names
from leon_jax.data.sources.field_values import (
    METADATA_NAMES,
    RecordError,
    check_image,
    read_metadata,
)
from leon_jax.data.sources.files import fingerprint, read_inside
from leon_jax.data.sources.random_access import IndexedSource
from leon_jax.data.sources.raw_record import MAX_IMAGE_BYTES, RawRecord, Reject, SourceConfig


class HuggingFace(IndexedSource):
    """A source of one split of a dataset.

    `path` is a folder made by `save_to_disk`, a folder that `load_dataset` understands (such as
    images with a `metadata.jsonl`), or a name on the hub. Unless the configuration names columns,
    the image is the first column of images and the text the first of `field_names.TEXT_NAMES`. A
    list of texts is read as captions of one image; they become one record each and form a
    group.

    Raises:
      UserError: the dataset, split or column does not exist or cannot be read.
    """

    def __init__(self, config: SourceConfig):
        self._folder = os.path.realpath(config.path) if os.path.isdir(config.path) else ""
        self._text = self._image = ""
        super().__init__(config)

    def version(self, shard: str) -> str:
        """Returns a fingerprint of the tables on disk."""
        return fingerprint(file["filename"] for file in self._rows.cache_files)

    def _open(self) -> datasets.Dataset:
        rows = self._load()
        images = [name for name, kind in rows.features.items() if _is_image(kind)]
        encoded = [
            name
            for name in (*field_names.IMAGE_NAMES, *field_names.ENCODED_NAMES)
            if name in rows.column_names and not _is_string(rows.features[name])
        ]
        self._image = _column(rows, self.config.picture, images + encoded, "image")
        self._text = _column(rows, self.config.text, field_names.TEXT_NAMES, "text")
        columns = dict.fromkeys((self._text, self._image, *METADATA_NAMES))
        rows = rows.select_columns([name for name in columns if name in rows.column_names])
        # The Arrow format returns the stored bytes; other formats decode images.
        return rows.with_format("arrow")

    def _load(self) -> datasets.Dataset:
        path = self.config.path
        try:
            if not self._folder or not _is_saved(self._folder):
                return datasets.load_dataset(path, split=self.split)
            saved = datasets.load_from_disk(path)
        except Exception as error:
            raise UserError(
                f"the split {self.split!r} of the dataset {path} cannot be loaded; the path must "
                "be a folder that the package datasets reads, or the name of a dataset on the hub"
            ) from error
        if isinstance(saved, datasets.Dataset):
            return saved
        if self.split not in saved:
            raise UserError(f"{path} has no split {self.split!r}; it has {', '.join(saved)}")
        return saved[self.split]

    def _read(self, index: int) -> list[RawRecord | Reject]:
        table = self._rows[index]
        # Arrow follows the offsets in a file without checking them, so validate an untrusted file.
        table.validate(full=True)
        row: dict[str, Any] = table.to_pylist()[0]
        metadata = read_metadata(row, self.config)
        metadata["key"] = metadata["key"] or f"{self.split}/{index}"
        image = self._image_bytes(row[self._image])
        captions = row[self._text]
        if captions is None:
            error = RecordError("missing_field", f"{self._text} is missing")
            captions = field_names.title_or(error, image)
        return field_names.caption_records(metadata, captions, image, self._text)

    def _image_bytes(self, value: Any) -> bytes:
        """Returns the image in a cell, or in the file of the dataset's folder that it names."""
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            if not self._folder:
                raise RecordError("missing_picture", "the image is a file outside the dataset")
            name = value["path"].removeprefix(self._folder + os.sep)
            return read_inside(self._folder, name, MAX_IMAGE_BYTES)
        return check_image(value, self._image)


def _is_saved(folder: str) -> bool:
    """Tells whether `save_to_disk` made the folder."""
    return any(
        os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")
    )


def _is_image(kind: Any) -> bool:
    return isinstance(kind, datasets.Image)


def _is_string(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string")


def _column(rows: datasets.Dataset, configured: str, usual: Sequence[str], content: str) -> str:
    """Returns the configured column or the first existing usual column."""
    for name in (configured,) if configured else usual:
        if name in rows.column_names:
            return name
    preferred = usual or field_names.IMAGE_NAMES
    text = field_names.missing(rows.column_names, configured, preferred, content, "column")
    raise UserError(f"the dataset cannot be used: {text}")
