"""Converts raw records into documents with decoded images, or rejects them with a reason."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from leon_jax.data import image_files
from leon_jax.data.image_error import ImageError
from leon_jax.data.sources.raw_record import (
    MAX_IMAGE_BYTES,
    RawRecord,
    Reason,
    Reject,
    SourceConfig,
)
from leon_jax.documents import Document, Image, Part, Provenance, Text, normalise_text
from leon_jax.prepare import licences
from leon_jax.prepare.config import DEFAULT_SIDE, PrepareConfig
from leon_jax.tokenizers.image import fit_image

Pixels = UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class PreprocessedDocument:
    """A document that passed every check, with its images preprocessed for each model.

    Without models `squares` and `encoder_inputs` are empty.

    Attributes:
      document: the document; its images are upright, `picture_side` pixels wide and high, and have
        no codes yet.
      size: (width, height) of the first original image in pixels, upright.
      squares: per image the input of the image tokenizer, uint8[resolution, resolution, 3].
      encoder_inputs: per image the output of the retrieval encoder's `preprocess`.
    """

    document: Document
    size: tuple[int, int]
    squares: tuple[Pixels, ...]
    encoder_inputs: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """What the models need to know of each document.

    Attributes:
      resolution: resolution of the image tokenizer in pixels.
      codes: number of image codes per image.
      preprocess: converts pixels into an input of the retrieval encoder.
      count_tokens: returns the number of token ids of a text.
    """

    resolution: int
    codes: int
    preprocess: Callable[[Pixels], np.ndarray]
    count_tokens: Callable[[str], int]


class RejectError(Exception):
    """A record is rejected, with a reason and a detail."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class RecordReader:
    """Converts raw records of one source into documents. It is thread-safe.

    Args:
      config: filters and the image size.
      source: defaults for fields that records lack.
      models: what the models need; None: the documents are not encoded.
    """

    def __init__(
        self, config: PrepareConfig, source: SourceConfig, models: ModelInputs | None = None
    ):
        self.config, self.source, self.models = config, source, models

    def __call__(self, raw: RawRecord | Reject) -> PreprocessedDocument | Reject:
        """Checks, decodes and preprocesses one record. Bad content never raises an exception."""
        if isinstance(raw, Reject):
            return raw
        try:
            return self._read(raw)
        except RejectError as error:
            return Reject(raw.key, error.reason, error.detail[:300])

    def _read(self, raw: RawRecord) -> PreprocessedDocument:
        # The cheapest checks come first.
        provenance = self._provenance(raw)
        # Normalising a very long hostile text can be slow, so check its length before.
        self._check_length(raw)
        raw = dataclasses.replace(
            raw,
            parts=tuple(
                normalise_text(part) if isinstance(part, str) else part for part in raw.parts
            ),
        )
        self._check_text(raw)
        parts: list[Part] = []
        squares, encoder_inputs, size = [], [], None
        models = self.models
        side = self.config.picture_side or (models.resolution if models else DEFAULT_SIDE)
        for part in raw.parts:
            if isinstance(part, str):
                parts.append(Text(part))
                continue
            image = self._decode(part)
            size = size or image.size
            parts.append(Image(pixels=fit_image(image, side)))
            if models is not None:
                squares.append(fit_image(image, models.resolution))
                encoder_inputs.append(models.preprocess(np.asarray(image)))
        if size is None:
            raise RejectError("no_picture", "the record holds no image")
        document = Document(tuple(parts), provenance)
        return PreprocessedDocument(document, size, tuple(squares), tuple(encoder_inputs))

    def _provenance(self, raw: RawRecord) -> Provenance:
        source = self.source
        stated = raw.licence or source.licence
        licence = licences.normal(stated)
        if licence is None:
            raise RejectError("licence_unknown", licences.explain(stated))
        if not licences.allows(self.config.licences, licence):
            flags = " ".join(
                f"--accept={name}" for name in licences.missing(self.config.licences, licence)
            )
            raise RejectError(
                "licence_not_allowed", f"its licence is {licence}, which {flags} would accept"
            )
        try:
            return Provenance(
                key=raw.key,
                source=raw.origin or source.name,
                licence=licence,
                attribution=raw.attribution or source.attribution,
                language=raw.language or source.language,
                group=raw.group,
                family=raw.family,
                captions=tuple(map(normalise_text, raw.captions)),
            )
        except ValueError as error:
            raise RejectError("missing_field", str(error)) from None

    def _check_length(self, raw: RawRecord) -> None:
        length = sum(len(part) for part in raw.parts if isinstance(part, str))
        length = max(length, sum(map(len, raw.captions)))
        if length > self.config.max_text:
            raise RejectError(
                "text_too_long", f"{length} characters; {self.config.max_text} are allowed"
            )

    def _check_text(self, raw: RawRecord) -> None:
        texts = [part for part in raw.parts if isinstance(part, str)]
        if not "".join(texts).strip():
            raise RejectError("no_text", "the record holds no text")
        metadata = (raw.key, raw.attribution, raw.language, raw.origin, raw.group, raw.family)
        for text in (*metadata, *raw.captions, *texts):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RejectError("not_utf8", "the text holds a lone surrogate") from None
        if self.models is None:
            return
        count = len(raw.parts)
        # <break> separates the parts, and </s> stands at both ends.
        tokens = sum(map(self.models.count_tokens, texts)) + count + 1
        tokens += (count - len(texts)) * self.models.codes
        if tokens > self.config.max_tokens:
            raise RejectError(
                "too_many_tokens", f"{tokens} ids; {self.config.max_tokens} are allowed"
            )

    def _decode(self, data: bytes):
        config = self.config
        if len(data) > MAX_IMAGE_BYTES:
            raise RejectError("record_too_large", f"an image of {len(data)} bytes")
        try:
            image = image_files.decode(io.BytesIO(data), "the image")
        except ImageError as error:
            raise RejectError(error.reason, str(error)) from None
        shorter, longer = sorted(image.size)
        size = f"{image.width} x {image.height} pixels"
        if shorter < config.min_side:
            raise RejectError("picture_too_small", f"{size}; the shorter side must be at least "
                          f"{config.min_side}")  # fmt: skip
        if longer > config.max_aspect * shorter:
            raise RejectError("picture_too_narrow", f"{size}; one side may be at most "
                          f"{config.max_aspect:g} times the other")  # fmt: skip
        return image
