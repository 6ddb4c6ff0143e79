"""The joint id layout: control tokens, image codes and text tokens share one token space.

    id                      token
    0 1 2 3                 <s> <pad> </s> <unk>
    4 ...                   image codes, one contiguous range, so image-only logits are a slice
    image_stop              <eoss>, the end of an infill
    image_stop + 1          <break>, a change of modality
    image_stop + 2 ...      <sentinel:0> <sentinel:1> ...
    ...                     reserved
    text_start ...          text tokens

With the default numbers there are 65,536 ids. `</s>` is at the start and at the end of a document,
as in metaseq. Text never becomes a control token: `<break>` in a caption is encoded with text ids.
"""

import dataclasses
from typing import Any, Self

import numpy as np
from jaxtyping import Int, Int32

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The number of ids of each kind, and their ranges.

    Attributes:
      image_codes: entries of the image tokenizer's codebook.
      sentinels: number of sentinels.
      text_start: first text id. The ids between the last sentinel and `text_start` are reserved.
      text_tokens: entries of the text tokenizer.

    Raises:
      ValueError: a count is too small, or `text_start` is before the end of the sentinels.
    """

    image_codes: int = 8192
    sentinels: int = 512
    text_start: int = 9216
    text_tokens: int = 56320

    def __post_init__(self):
        for name, minimum in (("image_codes", 1), ("sentinels", 0), ("text_tokens", 1)):
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name} is {value}; it must be at least {minimum}")
        if self.text_start < self.sentinel_stop:
            raise ValueError(
                f"text_start is {self.text_start}; {self.image_codes} image codes and "
                f"{self.sentinels} sentinels need it to be at least {self.sentinel_stop}"
            )

    @classmethod
    def compact(
        cls, image_codes: int, text_tokens: int, sentinels: int = 16, multiple: int = 1
    ) -> Self:
        """Returns a layout without reserved ids, for small models and tests.

        Args:
          image_codes: entries of the image tokenizer's codebook.
          text_tokens: entries of the text tokenizer.
          sentinels: number of sentinels.
          multiple: reserve the fewest ids that make `size` a multiple of this, so that the logits
            can be split evenly over devices.

        Raises:
          ValueError: a count or `multiple` is too small.
        """
        if multiple < 1:
            raise ValueError(f"multiple is {multiple}; it must be at least 1")
        text_start = len(_SPECIALS) + image_codes + 2 + sentinels
        text_start += -(text_start + text_tokens) % multiple
        return cls(image_codes, sentinels, text_start, text_tokens)

    # Constant ids are properties, too, so that all ids have the same interface.
    @property
    def bos(self) -> int:
        """`<s>`, for converted models; leon_jax does not use it."""
        return 0

    @property
    def pad(self) -> int:
        return 1

    @property
    def eos(self) -> int:
        """`</s>`, at the start and at the end of every document."""
        return 2

    @property
    def unk(self) -> int:
        return 3

    @property
    def image_start(self) -> int:
        """First image id: code `c` is id `image_start + c`."""
        return len(_SPECIALS)

    @property
    def image_stop(self) -> int:
        """One past the last image id."""
        return self.image_start + self.image_codes

    @property
    def eoss(self) -> int:
        """`<eoss>`, at the end of an infill."""
        return self.image_stop

    @property
    def break_id(self) -> int:
        """`<break>`, between two parts of a document and between two documents."""
        return self.image_stop + 1

    @property
    def sentinel_start(self) -> int:
        return self.image_stop + 2

    @property
    def sentinel_stop(self) -> int:
        """One past the last sentinel."""
        return self.sentinel_start + self.sentinels

    @property
    def text_stop(self) -> int:
        """One past the last text id."""
        return self.text_start + self.text_tokens

    @property
    def size(self) -> int:
        """Number of ids, including reserved ids."""
        return self.text_stop

    def sentinel(self, index: int) -> int:
        """Returns the id of `<sentinel:index>`.

        Raises:
          ValueError: there is no such sentinel.
        """
        if not 0 <= index < self.sentinels:
            raise ValueError(f"no <sentinel:{index}>: this vocabulary has {self.sentinels}")
        return self.sentinel_start + index

    def is_image(self, ids: Any) -> Any:
        """Returns True where an id is an image code. `ids` is an int or any integer array."""
        return (ids >= self.image_start) & (ids < self.image_stop)

    def is_sentinel(self, ids: Any) -> Any:
        """Returns True where an id is a sentinel. `ids` is an int or any integer array."""
        return (ids >= self.sentinel_start) & (ids < self.sentinel_stop)

    def is_text(self, ids: Any) -> Any:
        """Returns True where an id is a text token. `ids` is an int or any integer array."""
        return (ids >= self.text_start) & (ids < self.text_stop)

    def positions(
        self, ids: Int[np.ndarray, "length"], part_step: int = 1
    ) -> Int32[np.ndarray, "length"]:
        """Returns the positions of a document's ids: rows of the position table, from 0.

        With a `part_step` above 1, the first id of a part, which follows a `<break>`, has the next
        multiple of `part_step` as its position. An image then starts at one of few positions,
        whatever the length of the text before it. With 1, as in the paper, there are no gaps.
        """
        positions = np.arange(len(ids), dtype=np.int32)
        if part_step > 1:
            for first in np.flatnonzero(np.asarray(ids[:-1]) == self.break_id) + 1:
                positions[first:] += -positions[first] % part_step
        return positions

    def cells(self, ids: Int[np.ndarray, "length"]) -> Int32[np.ndarray, "length"]:
        """Returns the index of each image id in its run of image ids; -1 for other ids.

        In a document, a run is an image. If a span of an image is masked, the ids behind it are
        counted from 0 again.
        """
        is_image, index = self.is_image(np.asarray(ids)), np.arange(len(ids), dtype=np.int32)
        last_other = np.maximum.accumulate(np.where(is_image, -1, index))
        return np.where(is_image, index - last_other - 1, -1).astype(np.int32)

    def extent(self, ids: Int[np.ndarray, "length"], part_step: int = 1) -> int:
        """Returns the number of positions that ids occupy: the position of the next id."""
        return int(self.positions(np.append(ids, self.pad), part_step)[-1])

    def name(self, token: int) -> str:
        """Returns a readable name of an id, for error messages: `<break>`, `<image:17>`, ..."""
        token = int(token)
        if 0 <= token < len(_SPECIALS):
            return _SPECIALS[token]
        if token == self.eoss:
            return "<eoss>"
        if token == self.break_id:
            return "<break>"
        if self.is_image(token):
            return f"<image:{token - self.image_start}>"
        if self.is_sentinel(token):
            return f"<sentinel:{token - self.sentinel_start}>"
        if self.is_text(token):
            return f"<text:{token - self.text_start}>"
        if self.sentinel_stop <= token < self.text_start:
            return f"<reserved:{token}>"
        return f"<outside:{token}>"
