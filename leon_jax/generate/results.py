"""The results of requests: generated images and captions."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import PIL.Image

from leon_jax.data import image_files
from leon_jax.documents import Document
from leon_jax.engine.guidance import ClassifierFree, Plain
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.generate.image_metadata import credit


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """A generated image with its prompt, settings and retrieved documents.

    Attributes:
      image: the image.
      prompt: the prompt.
      seed: the random seed.
      params: the sampling parameters.
      retrieved: the retrieved documents in the context, with their licences.
      model: name and version of the model.
      settings: the other settings as JSON; see `settings_text`.
    """

    image: PIL.Image.Image
    prompt: str
    seed: int
    params: SamplingParams
    retrieved: tuple[Document, ...]
    model: str
    settings: str = ""

    def metadata(self) -> dict[str, str]:
        """Returns the text fields of a PNG file.

        `retrieved` is a JSON list with one object for each document. `guidance` is the weight of
        classifier-free guidance, 1 without guidance. It is left out for other kinds of guidance.
        """
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
        """Writes a PNG with `metadata` atomically. Creates its folder if it is missing.

        Raises:
          OSError: the file cannot be written.
        """
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        image_files.write_png(path, np.asarray(self.image), self.metadata())


@dataclasses.dataclass(frozen=True)
class Caption:
    """A generated text, its seed, and the retrieved documents in the context."""

    text: str
    seed: int
    retrieved: tuple[Document, ...]
