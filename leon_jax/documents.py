"""Documents: the type of sources, training examples, prompts and completions.

A document is an ordered tuple of parts (text, images, holes) and its provenance. A prompt is a
document with a hole. The completion fills the hole. All classes are immutable values: equal
contents compare equal and have equal hashes.
"""

import dataclasses
import operator
import unicodedata
from collections.abc import Sequence
from typing import Literal, Protocol, Self, get_args

import numpy as np
from jaxtyping import Int32, UInt8

Modality = Literal["text", "image"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text.

    Raises:
      TypeError: `text` is not a string.
      ValueError: `text` has a lone surrogate, which cannot be encoded.
    """

    text: str

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise TypeError(f"Text takes a string, not {type(self.text).__name__}")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate at position {error.start}; it must be valid unicode"
            ) from None


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image: its pixels, its codes of an image tokenizer, or both.

    The arrays are stored as read-only copies, so an Image can be a dictionary key.

    Attributes:
      pixels: sRGB, uint8[height, width, 3], or None.
      codes: codebook entries in raster order, int32[rows, cols], 0 or more, or None.

    Raises:
      TypeError: an array has the wrong dtype.
      ValueError: both are missing, an array has the wrong shape, or a code is negative or does not
        fit int32.
    """

    pixels: UInt8[np.ndarray, "height width 3"] | None = None
    codes: Int32[np.ndarray, "rows cols"] | None = None

    def __post_init__(self):
        if self.pixels is None and self.codes is None:
            raise ValueError("an Image needs pixels, codes or both; it has neither")
        if self.pixels is not None:
            pixels = np.asarray(self.pixels)
            if pixels.dtype != np.uint8:
                raise TypeError(f"pixels must be uint8 in 0..255, not {pixels.dtype}")
            if pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
                raise ValueError(f"pixels must be [height, width, 3], not {list(pixels.shape)}")
            object.__setattr__(self, "pixels", _read_only(pixels))
        if self.codes is not None:
            codes = np.asarray(self.codes)
            if not np.issubdtype(codes.dtype, np.integer):
                raise TypeError(f"codes must be integers, not {codes.dtype}")
            if codes.ndim != 2 or 0 in codes.shape:
                raise ValueError(f"codes must be [rows, cols], not {list(codes.shape)}")
            if codes.min() < 0:
                raise ValueError(f"codes must be 0 or more; the smallest is {codes.min()}")
            if codes.max() > np.iinfo(np.int32).max:
                raise ValueError(f"codes must fit int32; the largest is {codes.max()}")
            object.__setattr__(self, "codes", _read_only(codes.astype(np.int32)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Image):
            return NotImplemented
        return _equal(self.pixels, other.pixels) and _equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash(
            tuple(
                None if array is None else (array.shape, array.tobytes())
                for array in (self.pixels, self.codes)
            )
        )

    def __repr__(self) -> str:
        arrays = (
            f"{name}={array.dtype}{list(array.shape)}"
            for name, array in (("pixels", self.pixels), ("codes", self.codes))
            if array is not None
        )
        return f"Image({', '.join(arrays)})"


@dataclasses.dataclass(frozen=True)
class Hole:
    """A missing part, which the model fills with text or with an image.

    Attributes:
      modality: "text" or "image".
      first_rows: codes of the first rows of the image, [rows, cols] (as tuples), which stay as
        they are. Empty: the model generates the whole image.

    Raises:
      ValueError: the modality is neither "text" nor "image", a text hole has rows, a code is not
        a number, or the rows have different lengths.
    """

    modality: Modality
    first_rows: Sequence[Sequence[int]] | Int32[np.ndarray, "rows cols"] = ()

    def __post_init__(self):
        try:  # to tuples, so that a Hole can be compared and hashed
            rows = tuple(tuple(operator.index(code) for code in row) for row in self.first_rows)
        except (TypeError, ValueError) as error:
            raise ValueError("first_rows are rows of codes, which must be whole numbers") from error
        if rows and (self.modality != "image" or len(set(map(len, rows))) > 1):
            raise ValueError("first_rows are rows of codes of an image, all of the same length")
        object.__setattr__(self, "first_rows", rows)
        if self.modality not in get_args(Modality):
            raise ValueError(
                f'a Hole is filled with "text" or with "image", not with {self.modality!r}'
            )


Part = Text | Image | Hole


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of a document and its licence.

    Attributes:
      key: identifies the document in its source, for example "cats/0001".
      source: the dataset or package that the document is from.
      licence: an SPDX licence identifier, for example "CC-BY-4.0".
      attribution: the credit line that the licence requires; may be empty.
      language: BCP 47 tag of the text.
      group: documents of one group are variations of one thing; "" if the group is unknown. The
        retrieval encoder learns that they match each other.
      family: groups of one family are nearly alike, such as a thing in several colours; "" if the
        group is the whole family. Training of a decoder can weight families.
      captions: alternative captions of the document. The training of the retrieval encoder draws
        one of them at random; if there are none, it uses the text of the document.

    Raises:
      ValueError: key, source, licence or language is empty, a caption is empty, or a value is not
        a string.
    """

    key: str
    source: str
    licence: str
    attribution: str
    language: str = "en"
    group: str = ""
    family: str = ""
    captions: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "captions":
                self._check_captions()
            elif not isinstance(value, str) or (
                not value and field.name not in ("attribution", "group", "family")
            ):
                raise ValueError(f"provenance.{field.name} is {value!r}; it must be a string")

    def to_dict(self) -> dict[str, str | tuple[str, ...]]:
        """Returns the values by name, without `family` and `captions` if they are empty."""
        return {
            name: value
            for name, value in vars(self).items()
            if value or name not in ("family", "captions")
        }

    def _check_captions(self) -> None:
        if not isinstance(self.captions, tuple | list) or not all(
            isinstance(caption, str) and caption for caption in self.captions
        ):
            raise ValueError(
                f"provenance.captions is {self.captions!r}; it must be a tuple of strings"
            )
        object.__setattr__(self, "captions", tuple(self.captions))


@dataclasses.dataclass(frozen=True)
class Document:
    """Parts in reading order, with the provenance if it is known.

    Raises:
      TypeError: a part is not a Text, an Image or a Hole, or provenance is not a Provenance.
      ValueError: there are no parts.
    """

    parts: tuple[Part, ...]
    provenance: Provenance | None = None

    def __post_init__(self):
        if isinstance(self.parts, str | Text | Image | Hole):
            raise TypeError("Document takes a tuple of parts; write Document((part,)) for one part")
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise ValueError("a Document needs at least one part")
        for index, part in enumerate(self.parts):
            if not isinstance(part, Text | Image | Hole):
                raise TypeError(
                    f"parts[{index}] is {type(part).__name__}; a part is a Text, an Image or a Hole"
                )
        if not isinstance(self.provenance, Provenance | None):
            raise TypeError(
                f"provenance is {type(self.provenance).__name__}; it must be a Provenance or None"
            )

    @property
    def holes(self) -> tuple[int, ...]:
        """Indices of the holes in `parts`."""
        return tuple(i for i, part in enumerate(self.parts) if isinstance(part, Hole))

    @property
    def text(self) -> str:
        """All texts, in order, joined by spaces."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels of the first image with pixels.

        Raises:
          ValueError: no image has pixels.
        """
        for part in self.parts:
            if isinstance(part, Image) and part.pixels is not None:
                return part.pixels
        raise ValueError("the document has no image with pixels")

    @property
    def codes(self) -> Int32[np.ndarray, "rows cols"]:
        """The codes of the first image with codes.

        Raises:
          ValueError: no image has codes.
        """
        for part in self.parts:
            if isinstance(part, Image) and part.codes is not None:
                return part.codes
        raise ValueError("the document has no image with codes")

    def replace(self, index: int, part: Part) -> Self:
        """Returns the document with `parts[index]` replaced.

        Raises:
          IndexError: there is no such part.
        """
        parts = list(self.parts)
        parts[index] = part
        return dataclasses.replace(self, parts=tuple(parts))


def normalise_text(text: str) -> str:
    """Converts text to Unicode NFC, with one space between words and none at the ends.

    The time is quadratic in the longest run of combining marks.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


class Source(Protocol):
    """Documents with random access, for example a list or a split of a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def _read_only(array: np.ndarray) -> np.ndarray:
    if array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
        array.flags.writeable = False
    return array


def _equal(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)
