"""The joint id layout: control tokens, image codes and text tokens share one token space.

    id                      token
    0 1 2 3                 <s> <pad> </s> <unk>
    4 ...                   image codes, one contiguous range, so image-only logits are a slice
    image_stop              <eoss>, the end of an infill
    image_stop + 1          <break>, a change of modality
    image_stop + 2 ...      <sentinel:0> <sentinel:1> ...
    ...                     reserved
    text_start ...          text tokens

With the default numbers these are 65,536 ids. `</s>` stands both at the start and at the end of a
document, as in metaseq. Text never turns into a control token: `<break>` in a caption is spelled
with text ids.
"""

import dataclasses
from typing import Any, Self

import numpy as np
from jaxtyping import Int, Int32

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How many ids of each kind there are, and where they lie.

    Attributes:
      image_codes: entries of the image tokenizer's codebook.
      sentinels: how many infill marks there are.
      text_start: first text id; ids between the last sentinel and it are reserved.
      text_tokens: entries of the text tokenizer.

    Raises:
      ValueError: a count is impossible, or `text_start` lies before the end of the sentinels.
    """

    image_codes: int = 8192
    sentinels: int = 512
    text_start: int = 9216
    text_tokens: int = 56320

    def __post_init__(self):
        for name, least in (("image_codes", 1), ("sentinels", 0), ("text_tokens", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.text_start < self.sentinel_stop:
            raise ValueError(
                f"text_start is {self.text_start}; {self.image_codes} image codes and "
                f"{self.sentinels} sentinels need it to be at least {self.sentinel_stop}"
            )

    @classmethod
    def compact(
        cls, image_codes: int, text_tokens: int, sentinels: int = 16, multiple: int = 1
    ) -> Self:
        """The layout without reserved ids, for small models and tests.

        Args:
          image_codes: entries of the image tokenizer's codebook.
          text_tokens: entries of the text tokenizer.
          sentinels: how many infill marks there are.
          multiple: reserve as few ids as make `size` a multiple of this, so that the logits can
            be split evenly over devices.
        """
        if multiple < 1:
            raise ValueError(f"multiple is {multiple}; it must be at least 1")
        text_start = len(_SPECIALS) + image_codes + 2 + sentinels
        text_start += -(text_start + text_tokens) % multiple
        return cls(image_codes, sentinels, text_start, text_tokens)

    # The class-wide ids are properties too, so that every id is read the same way.
    @property
    def bos(self) -> int:
        """`<s>`; kept for converted models, not used by our own documents."""
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
        """`<eoss>` ends an infill."""
        return self.image_stop

    @property
    def break_id(self) -> int:
        """`<break>` stands between two parts of a document and between two documents."""
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
        """How many ids there are, reserved ones included."""
        return self.text_stop

    def sentinel(self, index: int) -> int:
        """The id of `<sentinel:index>`.

        Raises:
          ValueError: there is no such sentinel.
        """
        if not 0 <= index < self.sentinels:
            raise ValueError(f"no <sentinel:{index}>: this vocabulary has {self.sentinels}")
        return self.sentinel_start + index

    def is_image(self, ids: Any) -> Any:
        """True where an id is an image code; `ids` is an int or an integer array of any kind."""
        return (ids >= self.image_start) & (ids < self.image_stop)

    def is_sentinel(self, ids: Any) -> Any:
        """True where an id is a sentinel; `ids` is an int or an integer array of any kind."""
        return (ids >= self.sentinel_start) & (ids < self.sentinel_stop)

    def is_text(self, ids: Any) -> Any:
        """True where an id is a text token; `ids` is an int or an integer array of any kind."""
        return (ids >= self.text_start) & (ids < self.text_stop)

    def positions(
        self, ids: Int[np.ndarray, "length"], part_step: int = 1
    ) -> Int32[np.ndarray, "length"]:
        """The rows of the position table that a document's ids take, from 0.

        With a `part_step` above 1 the id after a `<break>`, the first of a part, takes the next
        multiple of it. A picture then starts at the same few positions however long the texts
        before it are. Without (1, as in the paper), positions just count.
        """
        places = np.arange(len(ids), dtype=np.int32)
        if part_step > 1:
            for first in np.flatnonzero(np.asarray(ids[:-1]) == self.break_id) + 1:
                places[first:] += -places[first] % part_step
        return places

    def extent(self, ids: Int[np.ndarray, "length"], part_step: int = 1) -> int:
        """How many positions ids take: the position of an id that would follow them."""
        return int(self.positions(np.append(ids, self.pad), part_step)[-1])

    def name(self, token: int) -> str:
        """What a person calls the id, for error messages and dumps: `<break>`, `<image:17>`, ..."""
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
