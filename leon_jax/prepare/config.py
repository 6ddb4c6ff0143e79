"""Configuration of `leon prepare` and `leon encode`: sources, models, filters and retrieval."""

import dataclasses

from leon_jax.config import UserError
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.retrieval.neighbour_selection import SelectionConfig

TRAIN = "train"
# The split of the documents that are held out from sources that name no split.
HELD_OUT = "held_out"
# Side of the stored images in pixels, if neither `picture_side` nor an image tokenizer is given.
DEFAULT_SIDE = 256

# Licences that permit training on an image and showing it with a credit line.
LICENCES = (
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC-BY-2.0",
    "CC-BY-2.5",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-2.0",
    "CC-BY-SA-2.5",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC-PDDC",
    "CC0-1.0",
    "MIT",
    "PDDL-1.0",
)


@dataclasses.dataclass(frozen=True)
class DuplicatesConfig:
    """Rules that drop duplicate documents.

    Similarity is the inner product of the image embeddings (unit vectors) of the retrieval encoder.

    Attributes:
      exact: drop a document that has the same text and the same stored images as an earlier one.
      near: similarity in (0, 1]; of two train documents above it the later one is dropped. None
        disables the check.
      evaluation: similarity in (0, 1]; a train document above it to any document of another split
        is dropped. None disables the check.
    """

    exact: bool = True
    near: float | None = None
    evaluation: float | None = None

    def __post_init__(self):
        for name in ("near", "evaluation"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"duplicates.{name} is {value}; it must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Everything that determines the content of a documents folder or of a prepared folder.

    With model files the documents are also encoded: the result is a prepared folder. Without them
    it is a documents folder, and the settings of the encoding are not used: `max_tokens`,
    `duplicates.near`, `duplicates.evaluation`, `selection` and `variants`.

    Attributes:
      sources: sources of documents. The split `train` is used for training and retrieval; every
        other split is held out. Of sources with the split "" a share is held out (`held_out`).
      tokenizer: path of the image tokenizer, `tokenizer.safetensors`; "" if there are no models.
      encoder: path of the retrieval encoder: `encoder.safetensors`, or a folder with OpenAI's CLIP.
      text: path of the text tokenizer, `text.json`.
      held_out: share of the groups of documents, in [0, 1), that becomes the split "held_out", of
        sources with the split "". A hash of a group decides; documents with equal images belong
        together.
      licences: SPDX identifiers of accepted licences (`LicenseRef-...` for unlisted ones).
      picture_side: side of the stored square images in pixels: the shorter side is resized and the
        centre cropped. 0 means the resolution of the image tokenizer, or 256 without models.
      min_side: minimum length of an image's shorter side, in pixels.
      max_aspect: maximum ratio of an image's longer side to its shorter side.
      max_text: maximum number of characters of a document's text, before normalisation.
      max_tokens: maximum number of token ids of a document, at least 3.
      duplicates: rules that drop duplicate documents.
      selection: how neighbours are selected.
      variants: number of encoded variants of each train image, at least 1
        (`leon_jax.data.image_variants`).
      pixels: whether encoded documents keep their images. False: they have codes only, and their
        images are read from the documents folder that they come from.
      block: number of documents that are encoded at a time; it bounds memory.

    Raises:
      UserError: a value is out of its range, no source has the split `train`, only some of the
        model files are given, or `duplicates.evaluation` is set without a held-out split.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: str = ""
    encoder: str = ""
    text: str = ""
    held_out: float = 0.05
    licences: tuple[str, ...] = LICENCES
    picture_side: int = 0
    min_side: int = 32
    max_aspect: float = 4.0
    max_text: int = 8192
    max_tokens: int = 4096
    duplicates: DuplicatesConfig = DuplicatesConfig()
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    variants: int = 1
    pixels: bool = True
    block: int = 256

    def __post_init__(self):
        if not self.sources:
            raise UserError("sources is empty; name at least one source")
        models = {"tokenizer": self.tokenizer, "encoder": self.encoder, "text": self.text}
        missing = [name for name, path in models.items() if not path]
        if 0 < len(missing) < len(models):
            raise UserError(f"{missing[0]} is empty; give all three model files, or none")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; it must be at least 0 and below 1")
        if TRAIN not in (source.split or TRAIN for source in self.sources):
            splits = ", ".join(source.split for source in self.sources)
            raise UserError(f"no source has the split {TRAIN!r}; the splits are {splits}")
        if self.has_models and self.duplicates.evaluation is not None and len(self.splits) == 1:
            raise UserError(
                "duplicates.evaluation is set, but all sources have the split "
                f"{TRAIN!r}; give held-out sources another split, for example 'exam'"
            )
        for name, least in (("variants", 1), ("block", 1), ("max_tokens", 3), ("picture_side", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def titles(self) -> tuple[str, ...]:
        """The default `provenance.source` of each source's records.

        This is the title of the source, or its path if sources with different paths share the
        title. Keys are unique only within a source, so the names must differ.
        """
        paths: dict[str, set[str]] = {}
        for source in self.sources:
            paths.setdefault(source.title, set()).add(source.path)
        return tuple(
            source.title if len(paths[source.title]) == 1 else source.path
            for source in self.sources
        )

    @property
    def has_models(self) -> bool:
        """Whether the documents are encoded."""
        return bool(self.tokenizer)

    @property
    def holds_out(self) -> bool:
        """Whether a share of the documents of sources without a split is held out."""
        return (
            not self.has_models
            and self.held_out > 0
            and any(not source.split for source in self.sources)
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits: train first, then the others in the order of the sources."""
        names = dict.fromkeys(source.split or TRAIN for source in self.sources)
        if self.holds_out:
            names[HELD_OUT] = None
        return (TRAIN, *(name for name in names if name != TRAIN))
