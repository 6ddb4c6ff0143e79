"""Which documents a training example or a prompt is given to read (CM3Leon, section 2.1).

Relevance: the score of the encoder decides the order. Modality: documents hold text and a picture,
and two are found through each part of the query. Diversity: a candidate that scores above the
encoder's near-copy threshold against the query or against a document already chosen is skipped; and
sources can be made to take turns.
Query dropout: in training, a fifth of the query's tokens is dropped before it is embedded.
Of the candidates found, up to three are drawn at random for each training example.

Offline, `build_neighbours` writes a table; while training, `sample_neighbours` draws from one of
its rows; while answering, `select` asks the index.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32
from tqdm import tqdm

from leon_jax.config import UserError
from leon_jax.documents import Document, Image, Source, Text
from leon_jax.retrieval.encoder import Encoder, normalise
from leon_jax.retrieval.index import NONE, Index, Views, load_arrays, save_arrays

# Cosine above which CLIP ViT-B/32 calls two documents copies of each other (CM3Leon, RA-CM3).
CLIP_NEAR_COPY = 0.9


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """How neighbours are found.

    Attributes:
      per_modality: how many are kept for the query's text, and how many for its picture.
      candidates: how many of the best documents are looked at before giving up.
      near_copy_text, near_copy_image, near_copy_document: an encoder's near-copy thresholds: for a
        query's text against documents, for its picture against documents, and for a document
        against a document already chosen. They depend on the encoder: see docs/retrieval.md.
      alternate_sources: every document comes from the source (see `Provenance`) that has given the
        fewest so far, among those that candidates are left of.
      query_dropout: the fraction of query tokens dropped in training.
      seed: of the dropout.
    """

    per_modality: int = 2
    candidates: int = 64
    near_copy_text: float = CLIP_NEAR_COPY
    near_copy_image: float = CLIP_NEAR_COPY
    near_copy_document: float = CLIP_NEAR_COPY
    alternate_sources: bool = False
    query_dropout: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if self.per_modality < 1 or self.candidates < self.per_modality:
            raise ValueError(
                f"per_modality is {self.per_modality} and candidates {self.candidates}; "
                "1 <= per_modality <= candidates is needed"
            )
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
    scores: Float32[np.ndarray, "c"],
    ids: Int32[np.ndarray, "c"],
    embeddings: Float32[np.ndarray, "n d"],
    k: int,
    near_copy_query: float,
    near_copy_chosen: float,
    exclude: Sequence[int] = (),
    source_of: Callable[[int], str] | None = None,
) -> list[int]:
    """Positions (into `ids`) of the best k candidates that are near copies of nothing.

    Args:
      scores, ids: candidates, best first; an id of -1 is no candidate.
      embeddings: the documents' unit rows, for comparing candidates with each other.
      k: how many to choose at most.
      near_copy_query: a candidate that scores above this against the query is skipped.
      near_copy_chosen: so is one that scores above this against a chosen document.
      exclude: ids never to choose, for example the query's own.
      source_of: the source of a document; sources then take turns (see `SelectionConfig`).
    """
    left = [
        place
        for place, (score, name) in enumerate(zip(scores, ids, strict=True))
        if name != NONE and name not in exclude and score <= near_copy_query
    ]
    chosen: list[int] = []
    taken: Counter[str] = Counter()
    sources = {place: source_of(int(ids[place])) if source_of else "" for place in left}
    while left and len(chosen) < k:
        fewest = min(taken[sources[place]] for place in left)
        best = next(place for place in left if taken[sources[place]] == fewest)
        chosen.append(best)
        taken[sources[best]] += 1
        alike = embeddings[ids[left]] @ embeddings[ids[best]] > near_copy_chosen
        left = [
            place for place, copy in zip(left, alike, strict=True) if not copy and place != best
        ]
    return chosen


def select(
    query_embedding: Float32[np.ndarray, "d"],
    index: Index,
    k: int,
    config: SelectionConfig | None = None,
    *,
    near_copy_query: float | None = None,
    exclude: Sequence[int] = (),
    source_of: Callable[[int], str] | None = None,
) -> list[int]:
    """The k documents to read for a prompt: relevant, and different from it and each other.

    Args:
      query_embedding: unit vector of the prompt.
      index: of the documents.
      k: how many at most; there may be fewer.
      config: thresholds; CLIP's by default.
      near_copy_query: the threshold against the query, `near_copy_document` by default.
      exclude: ids never to choose.
      source_of: the source of a document, for `config.alternate_sources`.

    Raises:
      UserError: the query does not fit the index.
    """
    config = config or SelectionConfig()
    if k < 1:
        return []
    width = min(len(index), max(config.candidates, k) + len(exclude))
    scores, ids = index.search(np.asarray(query_embedding)[None], width)
    limit = config.near_copy_document if near_copy_query is None else near_copy_query
    chosen = diverse(
        scores[0],
        ids[0],
        index.embeddings,
        k,
        limit,
        config.near_copy_document,
        exclude,
        source_of if config.alternate_sources else None,
    )
    return [int(name) for name in ids[0][chosen]]


def sample_neighbours(
    rng: np.random.Generator,
    by_text_ids: Int32[np.ndarray, "k"],
    by_image_ids: Int32[np.ndarray, "k"],
    max_docs: int,
) -> list[int]:
    """Up to `max_docs` distinct neighbours of a row of the table, in random order.

    Both lists are joined, each document counted once, shuffled, and the first `max_docs` kept.
    """
    both = np.unique(np.concatenate([by_text_ids, by_image_ids]))
    both = both[both != NONE]
    return [int(name) for name in rng.permutation(both)[:max_docs]]


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The table of a split; row i is record i, best first, -1 and -inf where there is none.

    Attributes:
      by_text_ids, by_image_ids: int32[n, k], train rows found through the query's text or picture.
      by_text_scores, by_image_scores: float32[n, k], the query part against those documents.
    """

    by_text_ids: Int32[np.ndarray, "n k"]
    by_image_ids: Int32[np.ndarray, "n k"]
    by_text_scores: Float32[np.ndarray, "n k"]
    by_image_scores: Float32[np.ndarray, "n k"]

    def save(self, path: str | os.PathLike) -> None:
        """Writes `neighbours_{split}.safetensors`, whole or not at all."""
        save_arrays(path, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Neighbours":
        """Reads what `save` wrote.

        Raises:
          UserError: there is no such file, or it is not a table of neighbours.
        """
        return cls(**load_arrays(path, [field.name for field in dataclasses.fields(cls)]))


def build_neighbours(
    documents: Source,
    encoder: Encoder,
    views: Views,
    config: SelectionConfig,
    *,
    own_rows: bool,
    sources: Sequence[str] = (),
    progress: str | None = None,
) -> Neighbours:
    """Finds every document's neighbours among the indexed ones.

    The text finds by its (token-dropped) embedding, the picture by its own; both are compared with
    whole documents, so what is found is multi-modal. A picture is a query as it is: what takes the
    place of dropout there is the near-copy threshold.

    Args:
      documents: each with a caption and a picture with pixels.
      encoder: the frozen encoder of the index.
      views: the train documents' index.
      config: how many, thresholds, dropout.
      own_rows: document i *is* row i of the index (the train split), so it is never its own
        neighbour; without it no query dropout is done either, as at answering time.
      sources: the source of every indexed document, which `config.alternate_sources` needs.
      progress: the label of a progress bar on standard error; None for no bar.

    Raises:
      UserError: a document lacks a caption or pixels, or `own_rows` does not fit.
    """
    if own_rows and len(documents) != len(views):
        raise UserError(f"{len(documents)} documents cannot be the {len(views)} rows of the index")
    if config.alternate_sources and len(sources) != len(views):
        raise UserError(f"{len(sources)} sources were given for the {len(views)} rows of the index")
    source_of = sources.__getitem__ if config.alternate_sources else None
    rng = np.random.default_rng(config.seed)
    tables: dict[str, list[np.ndarray]] = {
        field.name: [] for field in dataclasses.fields(Neighbours)
    }
    block = 256
    bar = tqdm(total=len(documents), desc=progress, unit="doc", disable=progress is None)
    for start in range(0, len(documents), block):
        some = [documents[i] for i in range(start, min(start + block, len(documents)))]
        texts, images = zip(*map(parts, some), strict=True)
        if own_rows and config.query_dropout:
            texts = [drop_tokens(t, encoder.text, config.query_dropout, rng) for t in texts]
        own = np.arange(start, start + len(some)) if own_rows else np.full(len(some), NONE)
        for part, queries, limit in (
            ("text", encoder.embed_texts(texts), config.near_copy_text),
            ("image", encoder.embed_images(images), config.near_copy_image),
        ):
            ids, scores = _neighbours(queries, own, views, config, limit, source_of)
            tables[f"by_{part}_ids"].append(ids)
            tables[f"by_{part}_scores"].append(scores)
        bar.update(len(some))
    bar.close()
    return Neighbours(**{name: np.concatenate(rows) for name, rows in tables.items()})


def _neighbours(
    queries: np.ndarray,
    own: np.ndarray,
    views: Views,
    config: SelectionConfig,
    near_copy: float,
    source_of: Callable[[int], str] | None,
) -> tuple[np.ndarray, np.ndarray]:
    found, names = views.document.search(queries, min(config.candidates, len(views)), own)
    ids = np.full((len(queries), config.per_modality), NONE, np.int32)
    scores = np.full(ids.shape, -np.inf, np.float32)
    for row in range(len(queries)):
        chosen = diverse(
            found[row],
            names[row],
            views.document.embeddings,
            config.per_modality,
            near_copy,
            config.near_copy_document,
            exclude=(own[row],),
            source_of=source_of,
        )
        ids[row, : len(chosen)] = names[row][chosen]
        scores[row, : len(chosen)] = found[row][chosen]
    return ids, scores


def embed_views(documents: Source, encoder: Encoder, progress: str | None = None) -> Views:
    """The index of documents that each have a caption and a picture with pixels.

    Raises:
      UserError: one lacks either.
    """
    text, image = [], []
    block = 256
    bar = tqdm(total=len(documents), desc=progress, unit="doc", disable=progress is None)
    for start in range(0, len(documents), block):
        some = [documents[i] for i in range(start, min(start + block, len(documents)))]
        texts, images = zip(*map(parts, some), strict=True)
        text.append(encoder.embed_texts(texts))
        image.append(encoder.embed_images(images))
        bar.update(len(some))
    bar.close()
    texts_all, images_all = np.concatenate(text), np.concatenate(image)
    return Views(texts_all, images_all, normalise(texts_all + images_all))


def origin(document: Document) -> str:
    """Where a document comes from; "" if that is not known."""
    return document.provenance.source if document.provenance else ""


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
