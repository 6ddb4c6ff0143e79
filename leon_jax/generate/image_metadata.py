"""Metadata of generated images: the settings, and the credits of the retrieved documents."""

import dataclasses
import json
from typing import Any

from leon_jax.documents import Document
from leon_jax.engine.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class ModelState:
    """The properties of a loaded model that a generated image depends on.

    Attributes:
      name: name and version of the model.
      digest: digest of the decoder's weights; see `ModelFolder.digest`.
      weights: dtype of the decoder's weights: "float32", "bfloat16" or "int8".
      cache: dtype of the KV cache: "compute" or "int8".
    """

    name: str
    digest: str
    weights: str
    cache: str


def settings_text(
    params: SamplingParams,
    model: ModelState,
    num_docs: int,
    best_of: int | None = None,
    rank_by: str = "clip",
    task: str = "generate",
) -> str:
    """Returns the settings of an image as JSON. Equal settings give equal text.

    Args:
      params: sampling parameters, under the key `sampling`; `SamplingParams.from_dict` reads them.
      model: the model that generated the image. Its name is not part of the text.
      num_docs: the maximum number of retrieved documents.
      best_of, rank_by: the number of images that the image was chosen from, and the ranking. If
        `best_of` is None, both are left out.
      task: the task, with its own numbers, for example "extend, 4 of 8 rows".
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
    """Returns `settings_text` as version 0.1.0 wrote it before sampling parameters were JSON."""
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


def credit(document: Document) -> dict[str, str]:
    """Returns a document's caption and, if known, key, source, licence and attribution."""
    provenance = document.provenance
    known = {} if provenance is None else {
        "key": provenance.key,
        "source": provenance.source,
        "licence": provenance.licence,
        "attribution": provenance.attribution,
    }  # fmt: skip
    return {"caption": document.text} | known
