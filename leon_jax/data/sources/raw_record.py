"""What every source gives: records as they were found, in shards, before anything is checked.

A source reads bytes and names; it decodes no picture and judges nothing but its own format. What
makes a document of a record is in `leon_jax.prepare.record_reader`, the same for all sources.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

from leon_jax.config import UserError

# Why a record is not used. The first group is found by sources, the others while preparing.
Reason = Literal[
    "unreadable_shard",  # the rest of a file cannot be read
    "unreadable_record",  # one record cannot
    "unsafe_name",  # a name that points out of its folder
    "missing_field",
    "missing_picture",  # a file that a record names is not there
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
    "picture_mode",  # colours that are not 8-bit RGB, grey or a palette
    "licence_unknown",
    "licence_not_allowed",
    "key_repeated",
    "copy_exact",
    "copy_near",
    "copy_of_evaluation",
    "removed_by_request",
]
REASONS: tuple[str, ...] = get_args(Reason)

# The largest encoded picture and the longest line or text that is read into memory.
LARGEST_PICTURE = 64 * 2**20
LARGEST_TEXT = 2**20


@dataclasses.dataclass(frozen=True)
class Raw:
    """One record of a source.

    Attributes:
      key: names it within the source; unique there, and the same whenever it is read.
      parts: in reading order, a text (str) or the bytes of an encoded picture.
      licence, attribution, language, origin, group: as `leon_jax.documents.Provenance` has them
        (`origin` is its `source`); "" where the record does not say.
    """

    key: str
    parts: tuple[str | bytes, ...]
    licence: str = ""
    attribution: str = ""
    language: str = ""
    origin: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Reject:
    """A record that is not used, and why.

    Attributes:
      key: of the record, or the best name there is for it.
      reason: one of `REASONS`; what is counted.
      detail: what a person needs to find the fault; at most a few hundred characters.
    """

    key: str
    reason: Reason
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a data set; see docs/bring_data.md for what each kind reads.

    Attributes:
      kind: the format; `open_source` knows which there are.
      path: a file, a folder or a pattern with `*` or `{000..010}`; of "tfds" and "huggingface",
        `NAME` or the folder that holds the data set.
      split: which split of the prepared folder it becomes.
      read_split: which split of a data set that has splits is read; by default the one called as
        `split`.
      name: what `provenance.source` says where records do not; by default the last part of `path`.
      licence, attribution, language: what holds for records that do not say. A record without a
        licence from either is refused.
      text, picture: the fields, columns or file endings to read, where the kind has a choice; by
        default those that its usual writers use.
      shard_size: how many records a unit of work has, where the format has no shards of its own.
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
    shard_size: int = 10_000

    def __post_init__(self):
        if self.shard_size < 1:
            raise UserError(f"shard_size is {self.shard_size}; it must be at least 1")
        if not self.split or not self.split.replace("_", "a").replace("-", "a").isalnum():
            raise UserError(
                f"split is {self.split!r}; it becomes part of file names, so use letters, digits, "
                "- and _"
            )

    @property
    def title(self) -> str:
        """What `provenance.source` says of records that do not say it themselves."""
        plain = [part for part in self.path.split("/") if part and not set("*?[{") & set(part)]
        return self.name or (plain[-1] if plain else self.path)


class Shards(Protocol):
    """A source: made of a `SourceConfig`, picklable, read shard by shard.

    Raises, when it is made or asked for its shards:
      UserError: there is nothing at `path`, or a package for the kind is not installed.
    """

    def shards(self) -> list[str]:
        """The names of all shards, in an order that does not change."""
        ...

    def version(self, shard: str) -> str:
        """What changes when the shard's records do: of a file, its size and modification time."""
        ...

    def read(self, shard: str) -> Iterator[Raw | Reject]:
        """The records of a shard, in an order that does not change.

        Never raises because of what a file holds: a bad record becomes a `Reject`, and so does
        the rest of a shard that cannot be read further.
        """
        ...
