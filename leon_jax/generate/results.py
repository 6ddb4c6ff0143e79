"""What is asked of an image, and what the calls of `Leon` return: an image or a caption."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from leon_jax.config import UserError
from leon_jax.data import image_files
from leon_jax.documents import Document
from leon_jax.engine.engine import Sample
from leon_jax.engine.guidance import ClassifierFree, Plain
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.generate import ranking


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images are generated for a prompt.

    Attributes:
      params: how ids are sampled; of several, the images take turns.
      num_images: how many images are returned. They have the seeds `seed`, `seed` + 1, ...
      num_docs: how many documents are retrieved and read first, at most.
      seed: of the first image, 0 or more; all seeds are below 2**32.
      best_of: how many images are generated; the `num_images` that fit the prompt best are
        returned, best first. None: as many as are returned, in the order of their seeds.
      rank_by: "clip", the cosine of image and prompt by the retrieval encoder; or "likelihood",
        that of the prompt as a caption of the image.

    Raises:
      UserError: a value is out of range.
    """

    params: tuple[SamplingParams, ...] = (SamplingParams(ClassifierFree(3.0)),)
    num_images: int = 1
    num_docs: int = 2
    seed: int = 0
    best_of: int | None = None
    rank_by: ranking.Ranking = "clip"

    def __post_init__(self):
        for params in self.params:
            params.check()
        if self.num_images < 1:
            raise UserError(f"num_images is {self.num_images}; it must be at least 1")
        count = self.num_images if self.best_of is None else self.best_of
        check_seed(self.seed, count)
        ranking.check(self.rank_by, count, self.num_images)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """One for each image that is generated."""
        count = self.num_images if self.best_of is None else self.best_of
        return tuple(Sample(self.seed + i, self.params[i % len(self.params)]) for i in range(count))


@dataclasses.dataclass(frozen=True)
class ModelState:
    """What an image depends on beside its request.

    Attributes:
      name: name and version of the model.
      digest: of the decoder; see `ModelFolder.digest`.
      weights: the dtype of the decoder's weights.
      cache: the dtype of cached keys and values.
    """

    name: str
    digest: str
    weights: str
    cache: str


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """An image, and how it was generated.

    Attributes:
      image: the image.
      prompt: what it was generated for.
      seed: of its random numbers.
      params: how its ids were sampled.
      retrieved: the documents that were read first, with their licences.
      model: name and version of the model.
      settings: everything else that it depends on; see `settings_text`.
    """

    image: PIL.Image.Image
    prompt: str
    seed: int
    params: SamplingParams
    retrieved: tuple[Document, ...]
    model: str
    settings: str = ""

    def metadata(self) -> dict[str, str]:
        """What a PNG file carries as text; `retrieved` is JSON, one object a document."""
        guidance, weight = self.params.guidance, {}
        if isinstance(guidance, Plain | ClassifierFree):
            weight = {"guidance": f"{getattr(guidance, 'weight', 1.0):g}"}
        return weight | {
            "prompt": self.prompt,
            "seed": str(self.seed),
            "model": self.model,
            "settings": self.settings,
            "retrieved": json.dumps(
                [credit(document) for document in self.retrieved], ensure_ascii=False
            ),
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes a PNG with `metadata`, whole or not at all; makes its folder if missing."""
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        image_files.write_png(path, np.asarray(self.image), self.metadata())


@dataclasses.dataclass(frozen=True)
class Caption:
    """A generated text, its seed, and the documents that were read first."""

    text: str
    seed: int
    retrieved: tuple[Document, ...]


def settings_text(
    params: SamplingParams,
    model: ModelState,
    num_docs: int,
    best_of: int | None = None,
    rank_by: str = "clip",
    task: str = "generate",
) -> str:
    """How an image was generated, as JSON. It is equal for images that were generated alike.

    Args:
      params: stands under `sampling`; `SamplingParams.from_dict` reads it back.
      model: what generated it.
      num_docs: how many documents were asked for.
      best_of, rank_by: of how many images it was chosen, and how.
      task: what was done, with its own numbers.
    """
    return _settings("sampling", params.to_dict(), model, num_docs, best_of, rank_by, task)


def former_settings_text(
    params: SamplingParams,
    model: ModelState,
    num_docs: int,
    best_of: int | None = None,
    rank_by: str = "clip",
    task: str = "generate",
) -> str:
    """`settings_text` as version 0.1.0 wrote it before sampling parameters were JSON."""
    strategy = (
        f"Strategy(guidance={params.guidance!r}, image={params.image!r}, text={params.text!r}, "
        f"start={params.guidance_start}, stop={params.guidance_stop})"
    )
    return _settings("strategy", strategy, model, num_docs, best_of, rank_by, task)


def _settings(
    key: str,
    sampling: Any,
    model: ModelState,
    num_docs: int,
    best_of: int | None,
    rank_by: str,
    task: str,
) -> str:
    values: dict[str, Any] = {
        "task": task,
        key: sampling,
        "num_docs": num_docs,
        "decoder": model.digest,
        "weights": model.weights,
        "cache": model.cache,
    }
    if best_of is not None:
        values |= {"best_of": best_of, "rank_by": rank_by}
    return json.dumps(values)


def check_seed(seed: int, count: int = 1) -> None:
    """Checks the seeds from `seed` on.

    Raises:
      UserError: one of them is not a number of 32 bits.
    """
    if not 0 <= seed <= 2**32 - count:
        raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - count}")


def credit(document: Document) -> dict[str, str]:
    """Caption, key, source, licence and attribution of a document, as far as they are known."""
    provenance = document.provenance
    known = {} if provenance is None else {
        "key": provenance.key,
        "source": provenance.source,
        "licence": provenance.licence,
        "attribution": provenance.attribution,
    }  # fmt: skip
    return {"caption": document.text} | known
