"""Configuration of training data: folders and their weights; of a decoder, examples and packing."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from leon_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class FolderComponent:
    """One folder of a mixture.

    Attributes:
      folder: a documents folder, or a prepared folder; a decoder needs a prepared folder.
      split: the split of the folder to train on.
      weight: share of the examples, relative to the other components; above 0.
      start: number of examples of the component's order that are left out at the beginning. A run
        that branches from another (`leon_jax.train.branch`) continues the order of that run.
      stream: number of the order; None: the place of the component in the mixture.

    Raises:
      UserError: the weight is not above 0, or a number is below 0.
    """

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("start", "stream")

    folder: str
    split: str = "train"
    weight: float = 1.0
    start: int = 0
    stream: int | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(f"weight is {self.weight}; it must be above 0")
        for name, number in (("start", self.start), ("stream", self.stream)):
            if number is not None and number < 0:
                raise UserError(f"{name} is {number}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class FoldersConfig:
    """Training data: one folder, or a mixture of several.

    Attributes:
      folder: a documents folder or a prepared folder; "" for a mixture.
      split: the split of the folder to train on.
      mixture: several folders; examples are sampled in proportion to their weights.

    Raises:
      UserError: both a folder and a mixture are set.
    """

    folder: str = ""
    split: str = "train"
    mixture: tuple[FolderComponent, ...] = ()

    def __post_init__(self) -> None:
        if self.folder and self.mixture:
            raise UserError(
                f"folder is {self.folder!r} and mixture is not empty; set only one of them"
            )

    @property
    def components(self) -> Sequence[FolderComponent]:
        """The components to train on: one for `folder`, or the mixture."""
        return (FolderComponent(self.folder, self.split),) if self.folder else self.mixture

    @property
    def keys(self) -> list[str]:
        """The config key of each component, for messages.

        Raises:
          UserError: there are no components.
        """
        if not self.components:
            raise UserError(
                "config.data.folder is empty; name a documents folder or a prepared folder, or set "
                "config.data.mixture"
            )
        if not self.mixture:
            return ["config.data"]
        return [f"config.data.mixture[{number}]" for number in range(len(self.mixture))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """The documents that a run is evaluated on (`loop.eval_every`). They come from its folders.

    Attributes:
      eval_split: a split that the run does not train on; "": the first one of each folder.
      eval_documents: number of documents, at least 1; all of them if there are fewer.

    Raises:
      UserError: `eval_documents` is below 1.
    """

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("eval_split", "eval_documents")

    eval_split: str = ""
    eval_documents: int = 256

    def __post_init__(self) -> None:
        if self.eval_documents < 1:
            raise UserError(f"eval_documents is {self.eval_documents}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class ImageDataConfig(FoldersConfig, HeldOutConfig):
    """Training data of an image tokenizer.

    Attributes:
      threads: number of threads that decode images in advance; 0 decodes them when they are needed.

    Raises:
      UserError: a value is out of range, or both a folder and a mixture are set.
    """

    threads: int = 2

    def __post_init__(self) -> None:
        FoldersConfig.__post_init__(self)
        HeldOutConfig.__post_init__(self)
        if self.threads < 0:
            raise UserError(f"threads is {self.threads}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class CaptionedImageDataConfig(ImageDataConfig):
    """Training data of a retrieval encoder.

    Attributes:
      text: path of the text tokenizer.

    Raises:
      UserError: a value is out of range, or both a folder and a mixture are set.
    """

    text: str = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """How documents become training examples; `DataConfig` and `MixtureComponent` share it.

    In a `MixtureComponent`, None means the value of the `DataConfig`. In a `DataConfig`, None means
    the value of `DEFAULTS`.

    Attributes:
      retrieved: probabilities of 0, 1, 2, ... retrieved documents; (1.0,) disables retrieval.
      variants: number of image variants, at least 1 (see `leon_jax.data.image_variants`). An
        example with retrieved documents uses a random one; 1 means unchanged images.
      unchanged: probability in [0, 1] that an example uses unchanged images anyway.
      balance: how queries are sampled. 0 samples all documents equally often, 1 all families of
        documents equally often (see `Provenance.family`; a group without a family is one). In
        between, a family of n documents has the weight n ** (1 - balance).

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
        """Returns the values of `defaults` for the fields of `ExampleConfig` that are None here."""
        names = [field.name for field in dataclasses.fields(ExampleConfig)]
        return {name: getattr(defaults, name) for name in names if getattr(self, name) is None}


DEFAULTS = ExampleConfig(retrieved=(1.0,), variants=1, unchanged=0.0, balance=0.0)


@dataclasses.dataclass(frozen=True)
class MixtureComponent(FolderComponent, ExampleConfig):
    """One prepared folder of a decoder's mixture, with its settings.

    Raises:
      UserError: a value is out of range.
    """

    def __post_init__(self) -> None:
        FolderComponent.__post_init__(self)
        ExampleConfig.__post_init__(self)

    def filled(self, defaults: ExampleConfig) -> "MixtureComponent":
        """Returns the component with the values of `defaults` for fields that are None."""
        return dataclasses.replace(self, **self._missing(defaults))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class DataConfig(FoldersConfig, ExampleConfig, HeldOutConfig):
    """Training data of a decoder: one prepared folder, or a mixture of several.

    Attributes:
      text: path of the text tokenizer.
      image_shape: rows and columns of the codes of an image.
      length: tokens per row; at most the `max_length` of the model.
      per_modality: number of candidates for retrieved documents per modality: the best neighbours
        by text, and as many by image.
      packing: how examples are packed into rows (see `leon_jax.data.packing`). "whole" never splits
        an example and leaves out retrieved documents that do not fit a row. "stream" takes examples
        of any length and splits them at the end of a row.
      packing_bins: for "whole", the number of rows that are open at a time, in batches. More bins
        need less padding and a longer replay after a restart.
      threads: number of threads that build examples in advance; 0 builds them when they are needed.

    Raises:
      UserError: a value is out of range, or both a folder and a mixture are set.
    """

    mixture: tuple[MixtureComponent, ...] = ()
    text: str = ""
    image_shape: tuple[int, ...] = (12, 12)
    length: int = 512
    per_modality: int = 2
    packing: Literal["whole", "stream"] = "whole"
    packing_bins: int = 4
    threads: int = 2

    def __post_init__(self) -> None:
        ExampleConfig.__post_init__(self)
        for name, value in self._missing(DEFAULTS).items():
            object.__setattr__(self, name, value)
        FoldersConfig.__post_init__(self)
        HeldOutConfig.__post_init__(self)
        for name in ("length", "per_modality", "packing_bins"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.threads < 0:
            raise UserError(f"threads is {self.threads}; it must be at least 0")

    @property
    def components(self) -> tuple[MixtureComponent, ...]:
        """The components to train on, with all values set; one for `folder`, or the mixture."""
        single = (MixtureComponent(self.folder, self.split),) if self.folder else ()
        return tuple(component.filled(self) for component in single or self.mixture)
