"""The file `model.json` of a model folder: generation defaults, index, data, licences, training."""

import dataclasses
import json
import os
from typing import Any, Literal

from leon_jax import config as configs
from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.engine.guidance import ClassifierFree
from leon_jax.engine.sampling_params import SamplingParams

FORMAT = 1
FILE = "model.json"
# The defaults of a model folder without `model.json`.
GUIDANCE, NUM_DOCS = 3.0, 2


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """The settings of generation where a request gives none.

    Attributes:
      sampling: sampling parameters of images.
      num_docs: maximum number of retrieved documents.
    """

    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(ClassifierFree(GUIDANCE))
    )
    num_docs: int = NUM_DOCS


@dataclasses.dataclass(frozen=True)
class IndexAddress:
    """Where the documents that a model retrieves are.

    Attributes:
      folder: a prepared folder: an absolute path, or a path relative to the model folder; "": none.
      prepare: "demo": the emoji documents, which are prepared at the first use.

    Raises:
      UserError: both are set.
    """

    folder: str = ""
    prepare: Literal["", "demo"] = ""

    def __post_init__(self) -> None:
        if self.folder and self.prepare:
            raise UserError(f"index has folder={self.folder} and prepare={self.prepare}; keep one")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """A dataset that files of a model were trained on.

    Attributes:
      name: its name.
      parts: the parts of the model: "decoder", "tokenizer", "encoder", "text".
      split: the split.
      documents: number of documents in the split; 0: not recorded.
      licences, sources: number of documents by SPDX expression, and by collection; 0: not
        recorded.
      credits: the credit lines that the licences ask for.
    """

    name: str
    parts: tuple[str, ...]
    split: str = "train"
    documents: int = 0
    licences: dict = dataclasses.field(default_factory=dict)
    sources: dict = dataclasses.field(default_factory=dict)
    credits: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """The content of `model.json`.

    Attributes:
      title: the heading of the model card.
      prompt: a prompt that suits the model, for the command of the card.
      generation: `sampling` (see `SamplingParams.to_dict`), `num_docs` (the default number of
        documents) and `max_docs` (the number that fits the context).
      index: where its documents are.
      licences: SPDX expressions of all data of all parts, with those of the base model.
      unknown_licences: parts whose data have no recorded licence.
      data: the datasets.
      training: for each part what is known: `steps`, `base` (the weights it started from),
        `config` and `file` (a config file of this repository).
      versions: versions of the packages that wrote the folder.
      digests: for each part the SHA-256 of its contents (see `leon_jax.prepare.encoding_models`).
      notes: Markdown that the card ends with.
      format: version of this format.
    """

    title: str
    prompt: str = ""
    generation: dict = dataclasses.field(default_factory=dict)
    index: IndexAddress = dataclasses.field(default_factory=IndexAddress)
    licences: tuple[str, ...] = ()
    unknown_licences: tuple[str, ...] = ()
    data: tuple[TrainingData, ...] = ()
    training: dict = dataclasses.field(default_factory=dict)
    versions: dict = dataclasses.field(default_factory=dict)
    digests: dict = dataclasses.field(default_factory=dict)
    notes: str = ""
    format: int = FORMAT

    def defaults(self) -> GenerationDefaults:
        """Returns the generation defaults.

        Raises:
          UserError: `generation` has an invalid value.
        """
        sampling = self.generation.get("sampling")
        num_docs = self.generation.get("num_docs", NUM_DOCS)
        if isinstance(num_docs, bool) or not isinstance(num_docs, int) or num_docs < 0:
            raise UserError(f"generation.num_docs is {num_docs!r}; it must be 0 or more")
        if sampling is None:
            return GenerationDefaults(num_docs=num_docs)
        if not isinstance(sampling, dict):
            raise UserError(f"generation.sampling is {sampling!r}; it must be a group of keys")
        return GenerationDefaults(SamplingParams.from_dict(sampling), num_docs)

    def to_json(self) -> str:
        """Returns the text of `model.json`."""
        return json.dumps(configs.to_dict(self), indent=1, ensure_ascii=False) + "\n"


def read(folder: str | os.PathLike) -> ModelDescription | None:
    """Reads `model.json` of a folder; None if the folder has none.

    Raises:
      UserError: the file cannot be read, is of a later format, or has an unknown or wrong value.
    """
    path = storage.path(folder) / FILE
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON in UTF-8: {error}") from error
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has format {values['format']}, this version reads {FORMAT}; "
            "write the folder again with leon export"
        )
    description = configs.build(ModelDescription, values, str(path))
    try:
        description.defaults()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return description
