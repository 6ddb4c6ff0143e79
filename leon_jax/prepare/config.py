"""What `leon prepare` is told: sources, models, filters, rules."""

import dataclasses

from leon_jax.config import UserError
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.retrieval.selection import SelectionConfig

TRAIN = "train"

# Licences under which pictures may be trained on and shown to others with a credit line.
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
    """Which documents are too close to others to be kept.

    Similarity is the inner product of the pictures' unit vectors under the retrieval encoder.

    Attributes:
      exact: whether a document with the same text and the same stored pictures as an earlier one
        is dropped.
      near: of two train documents above this similarity the later one is dropped; None: none is.
      evaluation: a train document above this similarity to a document of any other split is
        dropped; None: none is.
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
    """Everything that decides what a prepared folder holds.

    Attributes:
      sources: where documents come from. The split `train` is what is trained on and retrieved;
        every other split is held out.
      tokenizer: the image tokenizer's `tokenizer.safetensors`.
      encoder: the retrieval encoder: `encoder.safetensors`, or a folder of OpenAI's CLIP.
      text: the text tokenizer's `text.json`.
      licences: SPDX identifiers of licences that are accepted (`LicenseRef-...` for one's own).
      picture_side: side of the stored pictures in pixels, shorter side resized and the centre
        cropped; 0 takes the image tokenizer's resolution.
      min_side: pictures with a shorter side (in pixels) are refused.
      max_aspect: so are pictures whose longer side is more than so many times the shorter one.
      max_text: so are documents with more characters of text, as it came.
      max_tokens: so are documents with more token ids.
      duplicates: what is too close to what.
      selection: how neighbours are found.
      variants: how many variants of each train image are encoded (see
        `leon_jax.data.image_variants`).
      block: how many documents are encoded at a time; bounds memory.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: str
    encoder: str
    text: str
    licences: tuple[str, ...] = LICENCES
    picture_side: int = 0
    min_side: int = 32
    max_aspect: float = 4.0
    max_text: int = 8192
    max_tokens: int = 4096
    duplicates: DuplicatesConfig = DuplicatesConfig()
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    variants: int = 1
    block: int = 256

    def __post_init__(self):
        if not self.sources:
            raise UserError("sources is empty; name at least one source")
        if TRAIN not in (source.split for source in self.sources):
            splits = ", ".join(source.split for source in self.sources)
            raise UserError(f"no source becomes the split {TRAIN!r}, only {splits}")
        if self.duplicates.evaluation is not None and len(self.splits) == 1:
            raise UserError(
                "duplicates.evaluation is set, but all sources become the split "
                f"{TRAIN!r}; give what is held out a split of its own, for example 'exam'"
            )
        for name, least in (("variants", 1), ("block", 1), ("max_tokens", 3), ("picture_side", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def titles(self) -> tuple[str, ...]:
        """What `provenance.source` says of each source's records where they do not say it.

        The source's title, or its path where sources of other paths have the same title: keys are
        unique within a source only.
        """
        paths: dict[str, set[str]] = {}
        for source in self.sources:
            paths.setdefault(source.title, set()).add(source.path)
        return tuple(
            source.title if len(paths[source.title]) == 1 else source.path
            for source in self.sources
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """Train first, then the others in the order of the sources."""
        found = dict.fromkeys(source.split for source in self.sources)
        return (TRAIN, *(split for split in found if split != TRAIN))
