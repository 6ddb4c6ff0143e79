"""Which documents a training example or a prompt is given to read (CM3Leon, section 2.1).

Relevance: the score of the encoder decides the order. Modality: documents hold text and a picture,
and as many are found through each part of the query. Diversity: a near copy of the document that
asks, or of one already chosen, is skipped; and sources can be made to take turns. Near copies are
told by comparing whole documents: a part and a whole stay far from 1, however alike they are.
Query dropout: in training, a fifth of the query's tokens is dropped before it is embedded.
Of the candidates found, up to three are drawn at random for each training example.

Offline, `find_neighbours` fills a table; while training, `sample_neighbours` draws from one of its
rows; while answering, `select` searches the bank.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Text
from leon_jax.retrieval import diverse_selection
from leon_jax.retrieval.mining import NONE
from leon_jax.retrieval.vector_index import VectorIndex

# Cosine above which CLIP ViT-B/32 calls two documents copies of each other (CM3Leon, RA-CM3).
CLIP_NEAR_COPY = 0.9


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """How neighbours are found.

    Attributes:
      per_modality: how many a table of neighbours holds for the query's text, and how many for its
        picture. Training draws from the first few of them (`data.per_modality`).
      candidates: how many of the best documents are looked at before giving up.
      through_parts: whether documents are found through the query's text and through its picture,
        each by itself; otherwise through the mean of both.
      near_copy_query: a document that scores above this against the whole document that asks is
        skipped. Both thresholds depend on the encoder: see docs/retrieval.md.
      near_copy_document: so is one that scores above this against a document already chosen.
      near_copy_picture: so is, in `find_neighbours`, one whose picture scores above this against
        the picture of the document that asks, whatever its text says; None: pictures are not
        compared.
      alternate_sources: every document comes from the source (see `Provenance`) that has given the
        fewest so far, among those that candidates are left of.
      query_dropout: the fraction of query tokens dropped in training.
      seed: of the dropout.
      recall: 1: the candidates of `find_neighbours` are the best of all documents. Below: an
        approximate search finds this part of them on average (see `VectorIndex.search`).
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
    """What query dropout needs of a text tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text."""
        ...


def drop_tokens(text: str, tokenizer: Codec, fraction: float, rng: np.random.Generator) -> str:
    """The text without `fraction` of its tokens, rounded down, drawn at random; never without all.

    Rounded down, because captions of a few tokens would often lose what they are about.
    """
    ids = np.array(tokenizer.encode(text), np.int64)
    dropped = rng.permutation(len(ids))[: min(int(fraction * len(ids)), max(len(ids) - 1, 0))]
    return tokenizer.decode(np.delete(ids, dropped).tolist())


def diverse(
    ids: Int32[np.ndarray, "c"],
    rows: Float32[np.ndarray, "c d"],
    k: int,
    config: SelectionConfig,
    document: Float32[np.ndarray, "d"] | None = None,
    exclude: Sequence[int] = (),
    source_of: Callable[[int], str] | None = None,
) -> list[int]:
    """Positions (into `ids`) of the best k candidates that are near copies of nothing.

    Args:
      ids: candidates, best first; -1 is none.
      rows: the candidates' unit rows.
      k: how many to choose at most.
      config: thresholds, and whether sources take turns.
      document: unit row of the whole document that asks; None: what asks is no document.
      exclude: ids never to choose, for example the query's own.
      source_of: the source of a document, for `config.alternate_sources`.
    """
    copies = np.zeros(len(ids), bool)
    if document is not None:
        copies = rows @ document > config.near_copy_query
    left = [
        place
        for place, name in enumerate(ids)
        if name != NONE and name not in exclude and not copies[place]
    ]
    chosen: list[int] = []
    taken: Counter[str] = Counter()
    turns = source_of if config.alternate_sources else None
    sources = {place: turns(int(ids[place])) if turns else "" for place in left}
    while left and len(chosen) < k:
        fewest = min(taken[sources[place]] for place in left)
        best = next(place for place in left if taken[sources[place]] == fewest)
        chosen.append(best)
        taken[sources[best]] += 1
        alike = rows[left] @ rows[best] > config.near_copy_document
        left = [
            place for place, copy in zip(left, alike, strict=True) if not copy and place != best
        ]
    return chosen


def select(
    query_embedding: Float32[np.ndarray, "d"],
    bank: VectorIndex,
    k: int,
    config: SelectionConfig | None = None,
    *,
    document: Float32[np.ndarray, "d"] | None = None,
    exclude: Sequence[int] = (),
    sources_of: Callable[[Sequence[int]], Mapping[int, str]] | None = None,
) -> list[int]:
    """The k documents to read for a prompt: relevant, and different from it and each other.

    Args:
      query_embedding: unit vector of the prompt.
      bank: the documents.
      k: how many at most; there may be fewer.
      config: thresholds; CLIP's by default.
      document: unit vector of the whole document if the prompt is one with text and picture.
      exclude: ids never to choose.
      sources_of: the sources of some documents, for `config.alternate_sources`.

    Raises:
      UserError: the query does not fit the bank.
    """
    config = config or SelectionConfig()
    if k < 1:
        return []
    wide = max(config.candidates, k) + len(exclude)
    _, ids = bank.search(np.asarray(query_embedding)[None], wide)
    rows = bank.take(ids[0])
    source_of = None
    if config.alternate_sources and sources_of is not None:
        source_of = sources_of([int(name) for name in ids[0] if name != NONE]).__getitem__
    chosen = diverse(ids[0], rows, k, config, document, exclude, source_of)
    return [int(name) for name in ids[0][chosen]]


def sample_neighbours(
    rng: np.random.Generator,
    by_text_ids: Int32[np.ndarray, "k"],
    by_image_ids: Int32[np.ndarray, "k"],
    max_docs: int,
    per_modality: int | None = None,
) -> list[int]:
    """Up to `max_docs` distinct neighbours of a row of the table, in random order.

    Both lists are joined, each document counted once, shuffled, and the first `max_docs` kept. Only
    the best `per_modality` of each list take part: the table may hold more, and its first ones are
    what a table of so many would hold (see `find_neighbours`). None: all take part.
    """
    lists = by_text_ids[:per_modality], by_image_ids[:per_modality]
    both = np.unique(np.concatenate(lists))
    both = both[both != NONE]
    return [int(name) for name in rng.permutation(both)[:max_docs]]


def find_neighbours(
    queries: Float32[np.ndarray, "q d"],
    bank: VectorIndex,
    config: SelectionConfig,
    *,
    documents: Float32[np.ndarray, "q d"] | None = None,
    pictures: tuple[VectorIndex, Float32[np.ndarray, "q d"]] | None = None,
    own: Int32[np.ndarray, "q"] | None = None,
    sources: Int[np.ndarray, "n"] | None = None,
    keep: Bool[np.ndarray, "n"] | None = None,
) -> tuple[Int32[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The neighbours of many queries: `diverse` for each, on the devices of the mesh that is set.

    The choice is greedy, so of `config.per_modality` neighbours the first two are those that would
    have been found if two had been asked for with as many `candidates`. With several processes all
    must call it with the same arguments.

    Args:
      queries: unit rows; a row of zeros stands for a part that a document lacks and finds nothing.
      bank: the documents.
      config: how many, among how many, and the near-copy thresholds.
      documents: unit rows of the whole documents that the queries are parts of, none of whose near
        copies are their neighbours; None: the queries are no parts of documents.
      pictures: the pictures of the bank's documents and, for each query, that of the document it is
        a part of, unit rows, for `config.near_copy_picture`.
      own: for each query the document that it is a part of, which is never its neighbour; -1: none.
      sources: a number for the source of each document, which `config.alternate_sources` needs.
      keep: documents with False are never chosen.

    Returns:
      Ids int32[q, k] and scores float32[q, k], as chosen; -1 and -inf where there are fewer.

    Raises:
      UserError: the arguments do not fit each other, or a row of the bank is not finite.
    """
    queries = np.asarray(queries, np.float32)
    if own is not None and np.shape(own) != (len(queries),):
        raise UserError(f"own is {list(np.shape(own))}; {len(queries)} queries need one id each")
    if config.alternate_sources and (sources is None or len(sources) != len(bank)):
        given = "no" if sources is None else len(sources)
        raise UserError(
            f"{given} sources were given for the {len(bank)} documents, and "
            "selection.alternate_sources is set"
        )
    ids = np.full((len(queries), config.per_modality), NONE, np.int32)
    scores = np.full(ids.shape, -np.inf, np.float32)
    rows = np.flatnonzero(queries.any(axis=-1))
    found, names = bank.search(
        queries[rows],
        config.candidates,
        exclude=None if own is None else np.asarray(own)[rows],
        keep=keep,
        approximate=config.recall if config.recall < 1 else False,
    )
    # That of no candidate, -1, does not matter.
    origins = np.asarray(sources, np.int32)[names] if config.alternate_sources else None
    asking = []
    if documents is not None:
        asking.append((bank, np.asarray(documents)[rows], config.near_copy_query))
    if pictures is not None and config.near_copy_picture is not None:
        asking.append((pictures[0], np.asarray(pictures[1])[rows], config.near_copy_picture))
    places = diverse_selection.choose(
        names, bank, config.per_modality, config.near_copy_document, asking, origins
    )
    chosen = places != NONE
    ids[rows] = np.where(chosen, np.take_along_axis(names, places, axis=1), NONE)
    scores[rows] = np.where(chosen, np.take_along_axis(found, places, axis=1), -np.inf)
    return ids, scores


def parts(document: Document) -> tuple[str, np.ndarray]:
    """A document's texts, joined, and its first picture's pixels.

    Raises:
      UserError: it lacks either.
    """
    text = " ".join(part.text for part in document.parts if isinstance(part, Text))
    pictures = [p.pixels for p in document.parts if isinstance(p, Image) and p.pixels is not None]
    if not text or not pictures:
        key = document.provenance.key if document.provenance else "without provenance"
        raise UserError(f"the document {key} needs both text and a picture with pixels")
    return text, pictures[0]
