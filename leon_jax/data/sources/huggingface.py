"""Data sets of Hugging Face's `datasets` library, saved to a folder or loaded by name.

Nothing that comes with a data set is run: the library knows no loading scripts any more. Pictures
stay the bytes that they are stored as.
"""

import os
from typing import Any

import datasets

from leon_jax.config import UserError
from leon_jax.data.sources.field_values import CLAIM_NAMES, Fault, check_picture, check_text, claims
from leon_jax.data.sources.files import read_inside, version
from leon_jax.data.sources.random_access import Numbered, captions
from leon_jax.data.sources.raw_record import LARGEST_PICTURE, Raw, Reject, SourceConfig

TEXTS = ("text", "caption", "captions")


class HuggingFace(Numbered):
    """A source of one split of a data set.

    `path` is a folder made by `save_to_disk`, a folder that `load_dataset` understands (such as
    pictures with a `metadata.jsonl`), or a name on the hub. The picture is the first column of
    pictures and the text the first of `TEXTS`, unless the configuration names others. A text that
    is a list is several captions of one picture: a record each, which form a group.

    Raises:
      UserError: there is no such data set, split or column, or it cannot be read.
    """

    def __init__(self, config: SourceConfig):
        self._folder = os.path.realpath(config.path) if os.path.isdir(config.path) else ""
        self._text = self._picture = ""
        super().__init__(config)

    def version(self, shard: str) -> str:
        """Of the tables on disk that the data set is read from."""
        return version(file["filename"] for file in self._rows.cache_files)

    def _open(self) -> datasets.Dataset:
        rows = self._load()
        pictures = [name for name, kind in rows.features.items() if _is_picture(kind)]
        self._picture = _column(rows, self.config.picture, pictures, "pictures")
        self._text = _column(rows, self.config.text, list(TEXTS), "texts")
        wanted = dict.fromkeys((self._text, self._picture, *CLAIM_NAMES))
        rows = rows.select_columns([name for name in wanted if name in rows.column_names])
        # Arrow tables are the stored bytes; other formats decode.
        return rows.with_format("arrow")

    def _load(self) -> datasets.Dataset:
        path = self.config.path
        try:
            if not self._folder or not _is_saved(self._folder):
                return datasets.load_dataset(path, split=self.split)
            saved = datasets.load_from_disk(path)
        except Exception as error:
            raise UserError(
                f"the split {self.split!r} of the data set {path} cannot be loaded; it must be a "
                "folder that the package datasets reads, or a name that it finds"
            ) from error
        if isinstance(saved, datasets.Dataset):
            return saved
        if self.split not in saved:
            raise UserError(f"{path} has no split {self.split!r}; it has {', '.join(saved)}")
        return saved[self.split]

    def _read(self, index: int) -> list[Raw | Reject]:
        table = self._rows[index]
        # Offsets in a foreign file may point anywhere, and are followed without a check.
        table.validate(full=True)
        row: dict[str, Any] = table.to_pylist()[0]
        said = claims(row, self.config)
        said["key"] = said["key"] or f"{self.split}/{index}"
        picture = self._bytes(row[self._picture])
        text = row[self._text]
        if isinstance(text, list):
            return captions(said, text, picture)
        return [Raw(**said, parts=(check_text(text, self._text), picture))]

    def _bytes(self, value: Any) -> bytes:
        """The picture in a cell, or in the file below the data set's folder that it names."""
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            if not self._folder:
                raise Fault("missing_picture", "it is not in the data set but in a file")
            name = value["path"].removeprefix(self._folder + os.sep)
            return read_inside(self._folder, name, LARGEST_PICTURE)
        return check_picture(value, self._picture)


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` made the folder."""
    return any(
        os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")
    )


def _is_picture(kind: Any) -> bool:
    return isinstance(kind, datasets.Image)


def _column(rows: datasets.Dataset, chosen: str, usual: list[str], what: str) -> str:
    for name in [chosen] if chosen else usual:
        if name in rows.column_names:
            return name
    raise UserError(
        f"the data set has no column {f'{chosen!r}' if chosen else f'of {what}'}; its columns are "
        f"{', '.join(rows.column_names)}"
    )
