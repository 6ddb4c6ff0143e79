"""Selects the documents that are retrieved for a training example or a prompt.

The rules are those of CM3Leon, section 2.1. Relevance: the encoder's score decides the order.
Modality: documents have text and an image, and the same number is retrieved for each part of the
query. Diversity: near copies of the query document or of a chosen document are skipped, and the
sources can take turns. Near copies are detected by comparing whole documents, because the score of
a part and a whole document stays far below 1 even if they are alike. Query dropout: in training, a
fifth of the query's tokens is dropped before the query is embedded. Of the neighbours, up to three
are sampled at random for each training example.

Preparation fills a table with `find_neighbours`. Training samples from a row of the table with
`sample_neighbours`. Generation searches the index with `select`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Text
from leon_jax.retrieval import batched_selection
from leon_jax.retrieval.exact_search import NONE
from leon_jax.retrieval.vector_index import VectorIndex

# Two documents are near copies if their cosine by CLIP ViT-B/32 is above this (CM3Leon, RA-CM3).
CLIP_NEAR_COPY = 0.9


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Configures how neighbours are selected.

    Attributes:
      per_modality: number of neighbours in the table for the query's text, and for its image.
        Training samples from the first few of them (`data.per_modality`).
      candidates: number of best documents to choose the neighbours from.
      through_parts: search with the query's text and with its image separately. False: search with
        the mean of both.
      near_copy_query: a document is skipped if its score against the whole query document is above
        this. Both thresholds depend on the encoder: see docs/retrieval.md.
      near_copy_document: a document is skipped if its score against a chosen document is above
        this.
      near_copy_picture: `find_neighbours` skips a document if the score of its image against the
        query document's image is above this, whatever the texts are. None: images are not compared.
      alternate_sources: the next document comes from the source (see `Provenance`) with the fewest
        chosen documents, among the sources with candidates left.
      query_dropout: fraction of query tokens that is dropped in training, in [0, 1).
      seed: seed of the dropout.
      recall: 1: the candidates of `find_neighbours` are the best of all documents. Below 1, an
        approximate search returns this part of them on average (see `VectorIndex.search`).
    """

    per_modality: int = 20
    candidates: int = 128
    through_parts: bool = True
    near_copy_query: float = CLIP_NEAR_COPY
    near_copy_document: float = CLIP_NEAR_COPY
    near_copy_picture: float | None = 0.95
    alternate_sources: bool = False
    query_dropout: float = 0.2
    seed: int = 0
    recall: float = 1.0

    def __post_init__(self):
        if self.per_modality < 1 or self.candidates < self.per_modality:
            raise ValueError(
                f"per_modality is {self.per_modality} and candidates {self.candidates}; "
                "1 <= per_modality <= candidates is needed"
            )
        if not self.through_parts and self.candidates < 2 * self.per_modality:
            raise ValueError(
                f"per_modality is {self.per_modality} and candidates {self.candidates}; without "
                "through_parts twice per_modality must be at most candidates"
            )
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall is {self.recall}; it must be above 0 and at most 1")
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"query_dropout is {self.query_dropout}; it must be in [0, 1)")


class Codec(Protocol):
    """The methods of a text tokenizer that query dropout needs."""

    def encode(self, text: str) -> list[int]:
        """Converts text to token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Converts token ids to text."""
        ...


def drop_tokens(text: str, tokenizer: Codec, fraction: float, rng: np.random.Generator) -> str:
    """Drops a random `fraction` of the tokens of a text, rounded down, but never all of them.

    The number is rounded down because short captions would often lose their subject otherwise.
    """
    ids = np.array(tokenizer.encode(text), np.int64)
    dropped = rng.permutation(len(ids))[: min(int(fraction * len(ids)), max(len(ids) - 1, 0))]
    return tokenizer.decode(np.delete(ids, dropped).tolist())


def select_diverse(
    ids: Int32[np.ndarray, "c"],
    rows: Float32[np.ndarray, "c d"],
    k: int,
    config: SelectionConfig,
    document: Float32[np.ndarray, "d"] | None = None,
    exclude: Sequence[int] = (),
    source_of: Callable[[int], str] | None = None,
) -> list[int]:
    """Returns the positions (in `ids`) of the best k candidates without near copies.

    Args:
      ids: candidates, best first; -1 for none.
      rows: the candidates' unit rows.
      k: the largest number of candidates to choose.
      config: thresholds, and whether sources take turns.
      document: unit row of the whole query document; None: the query is not a document.
      exclude: ids that are never chosen, for example the id of the query document.
      source_of: returns the source of a document, for `config.alternate_sources`.
    """
    copies = np.zeros(len(ids), bool)
    if document is not None:
        copies = rows @ document > config.near_copy_query
    remaining = [
        position
        for position, row_id in enumerate(ids)
        if row_id != NONE and row_id not in exclude and not copies[position]
    ]
    chosen: list[int] = []
    chosen_of_source: Counter[str] = Counter()
    if config.alternate_sources and source_of is not None:
        sources = {position: source_of(int(ids[position])) for position in remaining}
    else:
        sources = dict.fromkeys(remaining, "")
    while remaining and len(chosen) < k:
        fewest = min(chosen_of_source[sources[position]] for position in remaining)
        best = next(
            position for position in remaining if chosen_of_source[sources[position]] == fewest
        )
        chosen.append(best)
        chosen_of_source[sources[best]] += 1
        alike = rows[remaining] @ rows[best] > config.near_copy_document
        remaining = [
            position
            for position, copy in zip(remaining, alike, strict=True)
            if not copy and position != best
        ]
    return chosen


def select(
    query_embedding: Float32[np.ndarray, "d"],
    index: VectorIndex,
    k: int,
    config: SelectionConfig | None = None,
    *,
    document: Float32[np.ndarray, "d"] | None = None,
    exclude: Sequence[int] = (),
    sources_of: Callable[[Sequence[int]], Mapping[int, str]] | None = None,
) -> list[int]:
    """Returns the ids of the documents to retrieve for a prompt, best first.

    They are relevant, and no near copies of the prompt or of each other.

    Args:
      query_embedding: unit vector of the prompt.
      index: the documents.
      k: the largest number of documents.
      config: thresholds; those of CLIP by default.
      document: unit vector of the whole document, if the prompt is a document with text and image.
      exclude: ids that are never chosen.
      sources_of: returns the source of each document by id, for `config.alternate_sources`.

    Raises:
      UserError: the query does not fit the index.
    """
    config = config or SelectionConfig()
    if k < 1:
        return []
    candidates = max(config.candidates, k) + len(exclude)
    _, ids = index.search(np.asarray(query_embedding)[None], candidates)
    rows = index.take(ids[0])
    source_of = None
    if config.alternate_sources and sources_of is not None:
        source_of = sources_of([int(row_id) for row_id in ids[0] if row_id != NONE]).__getitem__
    chosen = select_diverse(ids[0], rows, k, config, document, exclude, source_of)
    return [int(row_id) for row_id in ids[0][chosen]]


def sample_neighbours(
    rng: np.random.Generator,
    by_text_ids: Int32[np.ndarray, "k"],
    by_image_ids: Int32[np.ndarray, "k"],
    max_docs: int,
    per_modality: int | None = None,
) -> list[int]:
    """Samples up to `max_docs` distinct neighbours from a row of the table, in random order.

    The lists are joined without duplicates and shuffled; the first `max_docs` are returned.

    Args:
      rng: the random generator.
      by_text_ids: neighbours by text, best first; -1 for none.
      by_image_ids: neighbours by image, best first; -1 for none.
      max_docs: the largest number of neighbours.
      per_modality: use only this many of the best of each list; None: use all. The first entries
        of a longer list are those of a shorter one (see `find_neighbours`).
    """
    lists = by_text_ids[:per_modality], by_image_ids[:per_modality]
    both = np.unique(np.concatenate(lists))
    both = both[both != NONE]
    return [int(row_id) for row_id in rng.permutation(both)[:max_docs]]


def find_neighbours(
    queries: Float32[np.ndarray, "q d"],
    index: VectorIndex,
    config: SelectionConfig,
    *,
    documents: Float32[np.ndarray, "q d"] | None = None,
    images: tuple[VectorIndex, Float32[np.ndarray, "q d"]] | None = None,
    query_ids: Int32[np.ndarray, "q"] | None = None,
    sources: Int[np.ndarray, "n"] | None = None,
    keep: Bool[np.ndarray, "n"] | None = None,
    pictures: tuple[Int[np.ndarray, "n"], Int[np.ndarray, "q"]] | None = None,
) -> tuple[Int32[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Selects neighbours for many queries as `select_diverse` does, on the current mesh's devices.

    The choice is greedy: with the same `candidates`, a smaller `config.per_modality` gives the
    first neighbours of a larger one. With several processes, all must call it with the same
    arguments.

    Args:
      queries: unit rows. A row of zeros is a part that a document lacks; it gets no neighbours.
      index: the documents.
      config: numbers of neighbours and candidates, and the near-copy thresholds.
      documents: unit rows of the whole documents that the queries are parts of. Near copies of
        them are skipped. None: the queries are not parts of documents.
      images: an index with the images of the documents and, for each query, the unit row of its
        document's image, for `config.near_copy_picture`.
      query_ids: for each query the id of its document, which is never its neighbour; -1 for none.
      sources: a number for the source of each document, for `config.alternate_sources`.
      keep: documents with False are never chosen.
      pictures: a number for the image of each document of the index, and of each query's document.
        A document with the query's image is skipped, whatever its text is, and of several with the
        same image only the best is a candidate. None: images are not compared by number.

    Returns:
      Ids int32[q, k] and scores float32[q, k] in the order of choice; -1 and -inf where there are
      fewer than k.

    Raises:
      UserError: the arguments do not fit each other, or a row of the index is not finite.
    """
    queries = np.asarray(queries, np.float32)
    if query_ids is not None and np.shape(query_ids) != (len(queries),):
        raise UserError(
            f"query_ids is {list(np.shape(query_ids))}; {len(queries)} queries need one id each"
        )
    if config.alternate_sources and (sources is None or len(sources) != len(index)):
        count = "no" if sources is None else len(sources)
        raise UserError(
            f"{count} sources were given for the {len(index)} documents, and "
            "selection.alternate_sources is set"
        )
    ids = np.full((len(queries), config.per_modality), NONE, np.int32)
    scores = np.full(ids.shape, -np.inf, np.float32)
    rows = np.flatnonzero(queries.any(axis=-1))
    candidate_scores, candidate_ids = index.search(
        queries[rows],
        config.candidates,
        exclude=None if query_ids is None else np.asarray(query_ids)[rows],
        keep=keep,
        approximate=config.recall if config.recall < 1 else False,
    )
    if pictures is not None:
        candidate_ids = _without_equal_pictures(
            candidate_ids, np.asarray(pictures[0]), np.asarray(pictures[1])[rows]
        )
    candidate_sources = None
    if config.alternate_sources:
        # The source at id -1, which is no candidate, is never used.
        candidate_sources = np.asarray(sources, np.int32)[candidate_ids]
    comparisons = []
    if documents is not None:
        comparisons.append((index, np.asarray(documents)[rows], config.near_copy_query))
    if images is not None and config.near_copy_picture is not None:
        comparisons.append((images[0], np.asarray(images[1])[rows], config.near_copy_picture))
    positions = batched_selection.select_diverse_batch(
        candidate_ids,
        index,
        config.per_modality,
        config.near_copy_document,
        comparisons,
        candidate_sources,
    )
    chosen = positions != NONE
    ids[rows] = np.where(chosen, np.take_along_axis(candidate_ids, positions, axis=1), NONE)
    scores[rows] = np.where(
        chosen, np.take_along_axis(candidate_scores, positions, axis=1), -np.inf
    )
    return ids, scores


def _without_equal_pictures(
    ids: Int32[np.ndarray, "q c"],
    pictures: Int[np.ndarray, "n"],
    query_pictures: Int[np.ndarray, "q"],
) -> Int32[np.ndarray, "q c"]:
    """Replaces candidates by -1 that have the image of the query or of a better candidate."""
    numbers = np.where(ids == NONE, -1, pictures[ids])
    # A stable sort puts the best candidate of each image first.
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, axis=1)
    repeats = np.zeros(ids.shape, bool)
    np.put_along_axis(repeats, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(repeats | (numbers == query_pictures[:, None]), NONE, ids).astype(np.int32)


def text_and_pixels(document: Document) -> tuple[str, np.ndarray]:
    """Returns a document's texts, joined, and the pixels of its first image, uint8[h, w, 3].

    Raises:
      UserError: the document has no text or no image with pixels.
    """
    text = " ".join(part.text for part in document.parts if isinstance(part, Text))
    images = [p.pixels for p in document.parts if isinstance(p, Image) and p.pixels is not None]
    if not text or not images:
        key = document.provenance.key if document.provenance else "without provenance"
        raise UserError(f"the document {key} needs both text and an image with pixels")
    return text, images[0]
