"""What a decoder is trained on: prepared folders, and how their documents become rows of tokens."""

import dataclasses
from typing import Literal

from leon_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """How documents become training examples; `DataConfig` and `MixtureComponent` share it.

    A component of a mixture takes the run's value where it has None. A run has no None: it takes
    the value of `DEFAULTS`.

    Attributes:
      retrieved: probabilities of 0, 1, 2, ... retrieved documents; (1.0,) turns retrieval off.
      variants: how many variants of the images there are to choose from, one for each example with
        retrieved documents (see `leon_jax.data.image_variants`); 1: the images as they are.
      unchanged: probability that an example takes the images as they are all the same, in 0..1.
      balance: 0 takes every document equally often as a query, 1 every group of documents (see
        `Provenance.group`); in between, groups of n count as n ** (1 - balance).

    Raises:
      UserError: a value is out of range.
    """

    retrieved: tuple[float, ...] | None = None
    variants: int | None = None
    unchanged: float | None = None
    balance: float | None = None

    def __post_init__(self) -> None:
        retrieved = self.retrieved
        if retrieved is not None and (
            not retrieved or min(retrieved) < 0 or abs(sum(retrieved) - 1) > 1e-6
        ):
            raise UserError(f"retrieved is {retrieved}; probabilities must sum to 1")
        if self.variants is not None and self.variants < 1:
            raise UserError(f"variants is {self.variants}; it must be at least 1")
        if self.unchanged is not None and not 0 <= self.unchanged <= 1:
            raise UserError(f"unchanged is {self.unchanged}; it must be between 0 and 1")

    def _missing(self, defaults: "ExampleConfig") -> dict[str, object]:
        """What `defaults` says of the fields of `ExampleConfig` that are None here."""
        names = [field.name for field in dataclasses.fields(ExampleConfig)]
        return {name: getattr(defaults, name) for name in names if getattr(self, name) is None}


DEFAULTS = ExampleConfig(retrieved=(1.0,), variants=1, unchanged=0.0, balance=0.0)


@dataclasses.dataclass(frozen=True)
class MixtureComponent(ExampleConfig):
    """One of the prepared folders of a mixture.

    Attributes:
      folder: made by `leon prepare`.
      split: which of its splits.
      weight: how many examples come from here, relative to the other components; above 0.

    Raises:
      UserError: a value is out of range.
    """

    folder: str
    split: str = "train"
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise UserError(f"weight is {self.weight}; it must be above 0")

    def filled(self, defaults: ExampleConfig) -> "MixtureComponent":
        """The same component with the values of `defaults` where it has None."""
        return dataclasses.replace(self, **self._missing(defaults))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class DataConfig(ExampleConfig):
    """What a run of the decoder is trained on: one prepared folder, or a mixture of several.

    Attributes:
      folder: made by `leon prepare`; "" for a mixture.
      split: which of its splits.
      mixture: several folders instead; examples are chosen in proportion to their weights.
      text: the text tokenizer's file.
      image_shape: rows and columns of an image's codes.
      length: tokens of a row; the model's `max_length` or less.
      per_modality: how many of a document's neighbours retrieved ones are chosen from, of those
        found through its text and of those found through its image; the best of each.
      packing: how examples become rows (see `leon_jax.data.packing`): "whole", none is cut, and
        retrieved documents that do not fit the row are left out; or "stream", examples of any
        length, cut where a row is full.
      packing_bins: of "whole": rows that are filled side by side, in batches; more bins pad less,
        and cost a longer replay after a restart.
      threads: threads that make examples ahead; 0 makes them when they are needed.

    Raises:
      UserError: a value is out of range, or there is both a folder and a mixture.
    """

    folder: str = ""
    split: str = "train"
    mixture: tuple[MixtureComponent, ...] = ()
    text: str = "runs/emoji/text/export/text.json"
    image_shape: tuple[int, ...] = (12, 12)
    length: int = 512
    per_modality: int = 2
    packing: Literal["whole", "stream"] = "whole"
    packing_bins: int = 4
    threads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self._missing(DEFAULTS).items():
            object.__setattr__(self, name, value)
        if self.folder and self.mixture:
            raise UserError(
                f"folder is {self.folder!r}, but there is a mixture too; leave one of them empty"
            )
        for name in ("length", "per_modality", "packing_bins"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.threads < 0:
            raise UserError(f"threads is {self.threads}; it must be at least 0")

    @property
    def components(self) -> tuple[MixtureComponent, ...]:
        """The folders to train on, without None; one for `folder`, empty where none is named."""
        one = (MixtureComponent(self.folder, self.split),) if self.folder else ()
        return tuple(component.filled(self) for component in one or self.mixture)
