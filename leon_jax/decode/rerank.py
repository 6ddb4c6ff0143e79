"""Which of several pictures drawn for one prompt fit it best.

CM3Leon draws 8 pictures a prompt and keeps the one that a CLIP model scores highest (section 3.2).
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, UInt8

from leon_jax.config import UserError
from leon_jax.retrieval.encoder import Encoder

Ranking = Literal["clip", "likelihood"]


def by_clip(
    encoder: Encoder, prompt: str, pictures: Sequence[UInt8[np.ndarray, "height width 3"]]
) -> Float32[np.ndarray, "pictures"]:
    """The cosine of each picture with the prompt, by the retrieval encoder."""
    return encoder.embed_images(list(pictures)) @ encoder.embed_texts([prompt])[0]


def best(scores: Sequence[float] | Float32[np.ndarray, "pictures"], count: int) -> list[int]:
    """Positions of the `count` highest scores, highest first; of equal ones the earlier first."""
    return np.argsort(-np.asarray(scores), kind="stable")[:count].tolist()


def check(rank_by: str, best_of: int, count: int) -> None:
    """Checks what is asked for.

    Raises:
      UserError: there is no such ranking, or more pictures are to be kept than drawn.
    """
    if rank_by not in get_args(Ranking):
        raise UserError(f"rank_by is {rank_by!r}; it must be one of {', '.join(get_args(Ranking))}")
    if best_of < count:
        raise UserError(f"best_of is {best_of}; it must be at least num_images, {count}")
