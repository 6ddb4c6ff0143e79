"""The metadata of a generated image: how it was generated, and the credits of its sources."""

import dataclasses
import json
from typing import Any

from leon_jax.documents import Document
from leon_jax.engine.sampling_params import SamplingParams


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
