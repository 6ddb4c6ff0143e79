"""The interface of sources: they yield raw records, shard by shard.

A source reads texts, encoded images and metadata. It checks its own file format and decodes no
image. `leon_jax.prepare.record_reader` converts the raw records of all sources into documents.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

from leon_jax.config import UserError

# Why a record is rejected. Sources and `leon_jax.prepare` use these reasons.
Reason = Literal[
    "unreadable_shard",  # the rest of a file cannot be read
    "unreadable_record",  # one record cannot be read
    "unsafe_name",  # a name that leads out of its folder
    "missing_field",
    "missing_picture",  # a file that a record names does not exist
    "not_utf8",
    "record_too_large",
    "no_text",
    "no_picture",
    "text_too_long",
    "too_many_tokens",
    "picture_unreadable",
    "picture_too_large",
    "picture_too_small",
    "picture_too_narrow",
    "picture_animated",
    "picture_mode",  # colours that cannot be converted to 8-bit RGB
    "licence_unknown",
    "licence_not_allowed",
    "key_repeated",
    "copy_exact",
    "copy_near",
    "copy_of_evaluation",
    "removed_by_request",
    "picture_held_out",  # an image of a held-out document
]
REASONS: tuple[str, ...] = get_args(Reason)

# Maximum size of an encoded image, and of a line or a text, that is read into memory.
MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 2**20
# See `SourceConfig.records_per_shard`.
_SHARD_STEP, _SHARDS = 256, 64


@dataclasses.dataclass(frozen=True)
class RawRecord:
    """One record of a source.

    Attributes:
      key: name of the record, unique within the source and the same in every read.
      parts: texts (str) and encoded images (bytes), in reading order.
      licence, attribution, language, origin, group: the fields of
        `leon_jax.documents.Provenance` (`origin` is its `source`); "" if the record has none.
      captions: alternative captions of the document; see `leon_jax.documents.Provenance`.
      family: the family of the group; see `leon_jax.documents.Provenance`.
    """

    key: str
    parts: tuple[str | bytes, ...]
    licence: str = ""
    attribution: str = ""
    language: str = ""
    origin: str = ""
    group: str = ""
    captions: tuple[str, ...] = ()
    family: str = ""


@dataclasses.dataclass(frozen=True)
class Reject:
    """A rejected record.

    Attributes:
      key: key of the record, or its position if the key cannot be read.
      reason: one of `REASONS`, for counting.
      detail: description of the error, at most a few hundred characters.
    """

    key: str
    reason: Reason
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Configuration of one source; docs/bring_data.md describes the formats.

    Attributes:
      kind: the format, a kind that `open_source` knows.
      path: a file, a folder or a pattern with `*` or `{000..010}`. For "tfds" and "huggingface" the
        name of a dataset or its folder.
      split: the split that the records go to. "": train, and a share of the records is held out
        (see `PrepareConfig.held_out`).
      read_split: the split of the dataset to read, if it has splits; by default `split`, or train.
      name: default of `provenance.source`; by default the last part of `path`.
      licence, attribution, language: defaults for records without these fields. A record without
        any licence is rejected.
      text, picture: names of the fields, columns or file extensions to read, if the kind has a
        choice; by default the usual names (`leon_jax.data.sources.field_names`).
      caption_from_name: whether the kind "folder" takes the name of an image file as its caption
        if nothing else gives one.
      shard_size: maximum number of records per shard, if the format has no shards; at least 1.

    Raises:
      UserError: `shard_size` or `split` is invalid.
    """

    kind: str
    path: str
    split: str = "train"
    read_split: str = ""
    name: str = ""
    licence: str = ""
    attribution: str = ""
    language: str = "en"
    text: str = ""
    picture: str = ""
    caption_from_name: bool = False
    shard_size: int = 10_000

    def __post_init__(self):
        if self.shard_size < 1:
            raise UserError(f"shard_size is {self.shard_size}; it must be at least 1")
        if self.split and not self.split.replace("_", "a").replace("-", "a").isalnum():
            raise UserError(
                f"split is {self.split!r}; it becomes part of file names, so use letters, digits, "
                "- and _"
            )

    def records_per_shard(self, count: int) -> int:
        """Returns the number of records of each shard of one file or folder.

        A run that is stopped repeats one shard at most, so a small file has shards too: about
        `_SHARDS`, of a multiple of `_SHARD_STEP` records. `shard_size` is the maximum.

        Args:
          count: number of records, at least 0.
        """
        step = min(_SHARD_STEP, self.shard_size)
        steps = max(1, -(-count // (step * _SHARDS)))
        return step * min(steps, self.shard_size // step)

    @property
    def title(self) -> str:
        """The `provenance.source` of records without a source, unless two sources share it."""
        plain = [part for part in self.path.split("/") if part and not set("*?[{") & set(part)]
        return self.name or (plain[-1] if plain else self.path)


class ShardedSource(Protocol):
    """A source that is read shard by shard. It is created from a `SourceConfig` and picklable.

    The constructor and `shards` raise `UserError` if `path` does not exist or a package is missing.
    """

    def shards(self) -> list[str]:
        """Returns the names of all shards, in a stable order."""
        ...

    def version(self, shard: str) -> str:
        """Returns a string that changes with the records of a shard.

        For a file it depends on the size and the modification time.
        """
        ...

    def read(self, shard: str) -> Iterator[RawRecord | Reject]:
        """Yields the records of a shard, in a stable order.

        The content of a file never raises an exception. An invalid record yields a `Reject`; if the
        rest of a shard cannot be read, one `Reject` stands for it.
        """
        ...
