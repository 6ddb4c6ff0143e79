"""A raw record becomes a document with a picture that models can read, or a reason why not."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from leon_jax.data import image_files
from leon_jax.data.sources.raw_record import LARGEST_PICTURE, Raw, Reason, Reject, SourceConfig
from leon_jax.documents import Document, Image, Part, Provenance, Text, normalise_text
from leon_jax.prepare import licences
from leon_jax.prepare.config import PrepareConfig
from leon_jax.tokenizers.image import fit_image

Pixels = UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class Ready:
    """A document that passed every check, and its pictures as each model wants them.

    Attributes:
      document: upright pictures of `picture_side`, without codes.
      size: (width, height) of the first picture as it came, upright.
      squares: for each picture, uint8[resolution, resolution, 3] for the image tokenizer.
      views: for each picture, what the retrieval encoder's `preprocess` made of it.
    """

    document: Document
    size: tuple[int, int]
    squares: tuple[Pixels, ...]
    views: tuple[np.ndarray, ...]


class Refused(Exception):
    """A record is not used; the arguments are the reason and the detail."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Reader:
    """Raw records of one source to documents. Threads may share it.

    Args:
      config: filters and sizes.
      source: what holds where records do not say.
      resolution: of the image tokenizer.
      codes: how many ids one picture takes.
      preprocess: pixels to what the retrieval encoder embeds.
      count_tokens: how many ids a text takes.
    """

    def __init__(
        self,
        config: PrepareConfig,
        source: SourceConfig,
        resolution: int,
        codes: int,
        preprocess: Callable[[Pixels], np.ndarray],
        count_tokens: Callable[[str], int],
    ):
        self.config, self.source = config, source
        self.resolution, self.codes = resolution, codes
        self.preprocess, self.count_tokens = preprocess, count_tokens

    def __call__(self, raw: Raw | Reject) -> Ready | Reject:
        """Checks, decodes and fits one record; never raises because of what it holds."""
        if isinstance(raw, Reject):
            return raw
        try:
            return self._read(raw)
        except Refused as refused:
            return Reject(raw.key, refused.reason, refused.detail[:300])

    def _read(self, raw: Raw) -> Ready:
        # What costs nothing is asked first.
        provenance = self._provenance(raw)
        # Before the text is normalised, which takes long for a long text made to take long.
        self._check_length(raw)
        raw = dataclasses.replace(
            raw,
            parts=tuple(
                normalise_text(part) if isinstance(part, str) else part for part in raw.parts
            ),
        )
        self._check_text(raw)
        parts: list[Part] = []
        squares, views, size = [], [], None
        side = self.config.picture_side or self.resolution
        for part in raw.parts:
            if isinstance(part, str):
                parts.append(Text(part))
                continue
            picture = self._decode(part)
            size = size or picture.size
            parts.append(Image(pixels=fit_image(picture, side)))
            squares.append(fit_image(picture, self.resolution))
            views.append(self.preprocess(np.asarray(picture)))
        if size is None:
            raise Refused("no_picture", "the record holds no picture")
        return Ready(Document(tuple(parts), provenance), size, tuple(squares), tuple(views))

    def _provenance(self, raw: Raw) -> Provenance:
        source = self.source
        stated = raw.licence or source.licence
        licence = licences.normal(stated)
        if licence is None:
            said = (
                f"its licence is {stated!r}, no SPDX expression"
                if stated
                else ("neither it nor its source states a licence")
            )
            raise Refused("licence_unknown", said)
        if not licences.allows(self.config.licences, licence):
            raise Refused("licence_not_allowed", f"its licence is {licence}")
        try:
            return Provenance(
                key=raw.key,
                source=raw.origin or source.name,
                licence=licence,
                attribution=raw.attribution or source.attribution,
                language=raw.language or source.language,
                group=raw.group,
            )
        except ValueError as error:
            raise Refused("missing_field", str(error)) from None

    def _check_length(self, raw: Raw) -> None:
        length = sum(len(part) for part in raw.parts if isinstance(part, str))
        if length > self.config.max_text:
            raise Refused(
                "text_too_long", f"{length} characters; {self.config.max_text} are allowed"
            )

    def _check_text(self, raw: Raw) -> None:
        texts = [part for part in raw.parts if isinstance(part, str)]
        if not "".join(texts).strip():
            raise Refused("no_text", "the record holds no text")
        for text in (raw.key, raw.attribution, raw.language, raw.origin, raw.group, *texts):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise Refused("not_utf8", "the text holds a lone surrogate") from None
        count = len(raw.parts)
        # Every part but the last is followed by <break>; </s> stands at both ends.
        tokens = sum(map(self.count_tokens, texts)) + count + 1
        tokens += (count - len(texts)) * self.codes
        if tokens > self.config.max_tokens:
            raise Refused("too_many_tokens", f"{tokens} ids; {self.config.max_tokens} are allowed")

    def _decode(self, data: bytes):
        config = self.config
        if len(data) > LARGEST_PICTURE:
            raise Refused("record_too_large", f"a picture of {len(data)} bytes")
        try:
            picture = image_files.decode(io.BytesIO(data), "the picture", plain=True)
        except image_files.ImageError as error:
            raise Refused(error.reason, str(error)) from None
        shorter, longer = sorted(picture.size)
        shown = f"{picture.width} x {picture.height} pixels"
        if shorter < config.min_side:
            raise Refused("picture_too_small", f"{shown}; the shorter side must be at least "
                          f"{config.min_side}")  # fmt: skip
        if longer > config.max_aspect * shorter:
            raise Refused("picture_too_narrow", f"{shown}; one side may be at most "
                          f"{config.max_aspect:g} times the other")  # fmt: skip
        return picture
