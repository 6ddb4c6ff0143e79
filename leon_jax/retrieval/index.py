"""Exact maximum inner product search over the training documents, blocked to bound memory.

CM3Leon retrieves from hundreds of millions of documents with an approximate index; an exact search
answers the same question and is what an approximate one is measured against. One product of
`block` x `width` scores is alive at a time.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, Float32, Int, Int32

from leon_jax.config import UserError

# What an index file holds, by name: the embedding of each document's text, of its picture, and of
# the whole document (their renormalised mean).
VIEWS = ("text", "image", "document")
NONE = -1  # stands where there is no neighbour; its score is -inf


class Index:
    """Embeddings of a collection, searched by inner product.

    Args:
      embeddings: float32[n, d], row i for document i. Unit rows make a score a cosine.
      block: how many queries are scored at once.
      width: how many documents are scored at once.

    Raises:
      UserError: the embeddings are not a matrix, or hold numbers that are not finite.
    """

    def __init__(
        self, embeddings: Float32[np.ndarray, "n d"], block: int = 1024, width: int = 65_536
    ):
        embeddings = np.asarray(embeddings, np.float32)
        if embeddings.ndim != 2:
            raise UserError(f"an index needs embeddings[n, d], not {list(embeddings.shape)}")
        if not np.isfinite(embeddings).all():
            raise UserError("an index needs finite embeddings")
        self.embeddings = embeddings
        self.block = block
        self.width = max(1, min(width, len(embeddings)))

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(
        self,
        queries: Float32[np.ndarray, "q d"],
        k: int,
        exclude: Sequence[int] | Int32[np.ndarray, "q m"] | None = None,
    ) -> tuple[Float32[np.ndarray, "q k"], Int32[np.ndarray, "q k"]]:
        """The k documents with the largest inner products, best first.

        Equal scores come in the order of their ids. Where fewer than k documents are left, ids end
        in -1 and scores in -inf.

        Args:
          queries: float32[q, d].
          k: how many to return, at least 1.
          exclude: ids never to return: one for each query (int[q], -1 for none) or several
            (int[q, m]).

        Returns:
          Scores float32[q, k] and ids int32[q, k].

        Raises:
          UserError: k is below 1, or the sizes do not fit the index.
        """
        queries = np.asarray(queries, np.float32)
        if k < 1:
            raise UserError(f"k is {k}; a search returns at least 1 document")
        if queries.ndim != 2 or queries.shape[1] != self.embeddings.shape[1]:
            raise UserError(
                f"queries are {list(queries.shape)}; this index needs "
                f"[q, {self.embeddings.shape[1]}]"
            )
        count = len(queries)
        excluded = np.full((count, 1), NONE) if exclude is None else np.asarray(exclude)
        if excluded.ndim == 1:
            excluded = excluded[:, None]
        excluded = excluded.astype(np.int32)
        scores = np.full((count, k), -np.inf, np.float32)
        ids = np.full((count, k), NONE, np.int32)
        for start in range(0, count, self.block):
            rows = slice(start, start + self.block)
            # Every block has the same shape, so the search compiles once.
            size = min(self.block, 1 << (count - 1).bit_length())
            some, banned = _fill(queries[rows], size, 0), _fill(excluded[rows], size, NONE)
            best = self._search_block(some, banned, k)
            taken = len(queries[rows])
            scores[rows], ids[rows] = best[0][:taken], best[1][:taken]
        return scores, ids

    def _search_block(self, queries: np.ndarray, excluded: np.ndarray, k: int):
        scores = jnp.full((len(queries), k), -jnp.inf, jnp.float32)
        ids = jnp.full((len(queries), k), NONE, jnp.int32)
        for start in range(0, len(self), self.width):
            part = self.embeddings[start : start + self.width]
            valid = len(part)
            part = _fill(part, self.width, 0)
            scores, ids = _merge(scores, ids, queries, part, excluded, start, valid)
        return np.asarray(scores), np.asarray(ids)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _merge(
    scores: Float[Array, "q k"],
    ids: Int[Array, "q k"],
    queries: Float[Array, "q d"],
    part: Float[Array, "w d"],
    excluded: Int[Array, "q m"],
    start: Int[Array, ""],
    valid: Int[Array, ""],
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """The best k of those found so far and of one more stretch of documents."""
    found = jnp.einsum("qd,wd->qw", queries, part, precision=jax.lax.Precision.HIGHEST)
    here = start + jnp.arange(part.shape[0], dtype=jnp.int32)
    banned = (excluded[:, :, None] == here[None, None]).any(1) | (here >= start + valid)[None]
    found = jnp.where(banned, -jnp.inf, found)
    # top_k prefers the earlier of equals: older documents stand first.
    both = jnp.concatenate([scores, found], axis=1)
    names = jnp.concatenate([ids, jnp.broadcast_to(here, found.shape)], axis=1)
    scores, places = jax.lax.top_k(both, scores.shape[1])
    ids = jnp.take_along_axis(names, places, axis=1)
    return scores, jnp.where(jnp.isneginf(scores), NONE, ids)


def _fill(rows: np.ndarray, size: int, value: float) -> np.ndarray:
    """`rows` with rows of `value` added up to `size` of them."""
    missing = np.full((size - len(rows), *rows.shape[1:]), value, rows.dtype)
    return np.concatenate([rows, missing])


class Views:
    """The three indexes of a prepared folder, over the same documents in the same order.

    Raises:
      UserError: the matrices do not have the same number of rows.
    """

    def __init__(self, text: np.ndarray, image: np.ndarray, document: np.ndarray):
        if not len(text) == len(image) == len(document):
            raise UserError(
                f"the views of an index have {len(text)}, {len(image)} and {len(document)} rows; "
                "they must have one row for each document"
            )
        self.text, self.image, self.document = Index(text), Index(image), Index(document)

    def __len__(self) -> int:
        return len(self.document)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `index.safetensors`, whole or not at all."""
        arrays = {view: getattr(self, view).embeddings for view in VIEWS}
        save_arrays(path, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads what `save` wrote.

        Raises:
          UserError: there is no such file, or it is not an index.
        """
        return cls(**load_arrays(path, VIEWS))


def save_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as safetensors to a temporary name, then puts the file in place."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # Not `save_file`, which makes files that only their owner can read.
    temporary.write_bytes(safetensors.numpy.save(arrays))
    os.replace(temporary, path)


def load_arrays(path: str | os.PathLike, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads exactly these arrays from a safetensors file.

    Raises:
      UserError: there is no such file, it is damaged, or it holds other arrays.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no file {os.fspath(path)}; run: leon prepare")
    try:
        arrays = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error
    if set(arrays) != set(names):
        raise UserError(
            f"{os.fspath(path)} holds {', '.join(sorted(arrays))}; "
            f"{', '.join(sorted(names))} are needed"
        )
    return arrays
