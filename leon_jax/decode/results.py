"""What the answering calls return: a picture or a caption, and where it came from."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import PIL.Image

from leon_jax.data import pictures
from leon_jax.decode.strategy import Strategy
from leon_jax.documents import Document


@dataclasses.dataclass(frozen=True)
class Generation:
    """A picture that was drawn.

    Attributes:
      image: the picture.
      prompt, seed, guidance: what it was drawn for, and how; None if a strategy says how.
      retrieved: the documents that were read first, with their licences.
      model: name and version of what drew it.
      settings: everything else that it depends on; see `settings`.
    """

    image: PIL.Image.Image
    prompt: str
    seed: int
    guidance: float | None
    retrieved: tuple[Document, ...]
    model: str
    settings: str = ""

    def metadata(self) -> dict[str, str]:
        """What a PNG file carries as text; `retrieved` is JSON, one object a document."""
        guidance = {} if self.guidance is None else {"guidance": f"{self.guidance:g}"}
        return guidance | {
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
        pictures.write_png(path, np.asarray(self.image), self.metadata())


def settings(
    strategy: Strategy,
    num_docs: int,
    digest: str,
    kept: tuple[str, str],
    best_of: int | None = None,
    rank_by: str = "clip",
    task: str = "generate",
) -> str:
    """How a picture was drawn, as JSON: equal for pictures that were drawn alike.

    Args:
      strategy: said as Python writes it.
      num_docs: how many documents were wanted.
      digest: of the decoder; see `Checkpoint.digest`.
      kept: what weights and cache were kept in.
      best_of, rank_by: of how many it was chosen, and how.
      task: what was done, and with which numbers of its own.
    """
    said = {
        "task": task,
        "strategy": repr(strategy),
        "num_docs": num_docs,
        "decoder": digest,
        "weights": kept[0],
        "cache": kept[1],
    }
    if best_of is not None:
        said |= {"best_of": best_of, "rank_by": rank_by}
    return json.dumps(said)


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption that was written, its seed, and the documents that were read first."""

    text: str
    seed: int
    retrieved: tuple[Document, ...]


def credit(document: Document) -> dict[str, str]:
    """Caption, key, source, licence and attribution of a document, as far as they are known."""
    origin = document.provenance
    known = {} if origin is None else {
        "key": origin.key,
        "source": origin.source,
        "licence": origin.licence,
        "attribution": origin.attribution,
    }  # fmt: skip
    return {"caption": document.text} | known
