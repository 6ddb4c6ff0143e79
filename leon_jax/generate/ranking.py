"""Ranks the images generated for one prompt by how well they fit it.

CM3Leon generates 8 images for each prompt and keeps the one that CLIP scores highest (section 3.2).
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Text
from leon_jax.retrieval.encoder import RetrievalEncoder
from leon_jax.tokenizers.documents import DocumentTokenizer

Ranking = Literal["clip", "likelihood"]


def clip_scores(
    encoder: RetrievalEncoder, prompt: str, images: Sequence[UInt8[np.ndarray, "height width 3"]]
) -> Float32[np.ndarray, "images"]:
    """Returns the cosine similarity of each image and the prompt by the retrieval encoder."""
    return encoder.embed_images(list(images)) @ encoder.embed_texts([prompt])[0]


def scored_ids(
    tokenizer: DocumentTokenizer,
    document: Document,
    part: int | None,
    retrieved: Sequence[Document] = (),
) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Returns the ids of a document and their weights, for `log_likelihoods`.

    The weight is 1 for ids that are scored, and 0 for the others.

    Args:
      tokenizer: the document tokenizer.
      document: a document without holes; its images have codes.
      part: index of the part that is scored, given the others; None: all parts are scored.
      retrieved: documents to read before it, in this order; they are not scored.

    Raises:
      UserError: the document has holes or lacks the part, or a document cannot be encoded.
    """
    if document.holes:
        raise UserError("a likelihood needs a document without holes")
    if part is None:
        ids = tokenizer.encode([*retrieved, document])
        scored = len(tokenizer.encode(document)) - 1
    else:
        if not 0 <= part < len(document.parts):
            raise UserError(
                f"part is {part}; the document has the parts 0 to {len(document.parts) - 1}"
            )
        content = document.parts[part]
        hole = Hole("text" if isinstance(content, Text) else "image")
        question = [*retrieved, document.replace(part, hole)]
        answer = tokenizer.completion(question, [content])
        ids = np.concatenate([tokenizer.prompt(question), answer])
        scored = len(answer)
    weights = np.zeros(len(ids), np.float32)
    weights[-scored:] = 1
    return ids, weights


def best(scores: Sequence[float] | Float32[np.ndarray, "images"], count: int) -> list[int]:
    """Returns the indices of the `count` highest scores, highest first. Ties keep their order."""
    return np.argsort(-np.asarray(scores), kind="stable")[:count].tolist()


def check(rank_by: str, best_of: int, num_images: int) -> None:
    """Checks the arguments of a ranking.

    Raises:
      UserError: `rank_by` is not a ranking, or `best_of` is below `num_images`.
    """
    if rank_by not in get_args(Ranking):
        raise UserError(f"rank_by is {rank_by!r}; it must be one of {', '.join(get_args(Ranking))}")
    if best_of < num_images:
        raise UserError(f"best_of is {best_of}; it must be at least num_images, {num_images}")
