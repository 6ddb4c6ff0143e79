"""Finds the neighbours of every document of a prepared folder among the documents of train."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from leon_jax import sharding
from leon_jax.prepare import gather
from leon_jax.prepare.config import TRAIN, PrepareConfig
from leon_jax.retrieval.exact_search import PASS
from leon_jax.retrieval.neighbour_selection import SelectionConfig, find_neighbours
from leon_jax.retrieval.neighbour_table import row_type
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.retrieval.vector_index import VectorIndex, save_rows


def mine(
    config: PrepareConfig, prepared: PreparedFolder, parts: pathlib.Path, progress: bool
) -> None:
    """Writes the neighbour tables of all splits."""
    bank, images = prepared.vector_index(), gather.image_index(parts, prepared.shards(TRAIN))
    selection = config.selection
    sources = gather.source_numbers(prepared) if selection.alternate_sources else None
    pictures = gather.picture_numbers(prepared)
    total = sum(prepared.manifest["splits"].values())
    with (
        tqdm(total=total, desc="neighbours", unit="doc", disable=not progress) as bar,
        jax.set_mesh(sharding.make_mesh()),
    ):
        for split in prepared.manifest["splits"]:
            start = 0
            for group in _groups(prepared.shards(split)):
                paths = {name: prepared.folder / f"{name}.neighbours.npy" for name in group}
                count = sum(group.values())
                if not all(path.exists() for path in paths.values()):
                    vectors = [gather.query_vectors(parts, name) for name in group]
                    queries = {
                        view: np.concatenate([shard_vectors[view] for shard_vectors in vectors])
                        for view in vectors[0]
                    }
                    rows = np.arange(start, start + count, dtype=np.int32)
                    table = neighbour_rows(
                        queries,
                        bank,
                        images,
                        selection,
                        rows if split == TRAIN else None,
                        sources,
                        (pictures[TRAIN], pictures[split][rows]) if pictures else None,
                    )
                    ends = np.cumsum([0, *group.values()])
                    for path, low, high in zip(paths.values(), ends, ends[1:], strict=False):
                        save_rows(path, table[low:high])
                start += count
                bar.update(count)


def _groups(shards: dict[str, int]) -> Iterator[dict[str, int]]:
    """Groups shards, given with their numbers of documents, that share one pass over the index."""
    group: dict[str, int] = {}
    for name, count in shards.items():
        if group and sum(group.values()) + count > PASS:
            yield group
            group = {}
        group[name] = count
    if group:
        yield group


def neighbour_rows(
    queries: dict[str, np.ndarray],
    bank: VectorIndex,
    images: VectorIndex,
    selection: SelectionConfig,
    query_rows: np.ndarray | None,
    sources: np.ndarray | None,
    pictures: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Finds the neighbours of documents and returns them as rows of a neighbour table.

    Args:
      queries: float16[n, d] unit rows by view: "text", "image" and "document".
      bank: the document vectors of train.
      images: the image embeddings of train, in the same order.
      selection: how neighbours are selected.
      query_rows: int32[n], the rows of the documents in `bank`, which a document must not find
        itself in; None for held-out documents.
      sources: int32, the source of each row of `bank`, or None.
      pictures: int32, a number for the image of each row of `bank`, and of each document; or None.

    Returns:
      Structured [n] of the dtype `leon_jax.retrieval.neighbour_table.row_type`.
    """
    count = len(queries["text"])
    table = np.zeros(count, row_type(selection.per_modality))
    views: tuple[str, ...] = ("text", "image")
    if not selection.through_parts:
        views = ("document",)
        selection = dataclasses.replace(selection, per_modality=2 * selection.per_modality)
    for start in range(0, count, PASS):
        rows = slice(start, start + PASS)
        for view in views:
            ids, scores = find_neighbours(
                queries[view][rows],
                bank,
                selection,
                documents=queries["document"][rows],
                images=(images, queries["image"][rows]),
                query_ids=None if query_rows is None else query_rows[rows],
                sources=sources,
                pictures=(pictures[0], pictures[1][rows]) if pictures else None,
            )
            # The neighbours of a whole document alternate between the two halves of the table.
            halves = (view,) if view != "document" else ("text", "image")
            for offset, half in enumerate(halves):
                table[f"by_{half}_ids"][rows] = ids[:, offset :: len(halves)]
                table[f"by_{half}_scores"][rows] = scores[:, offset :: len(halves)]
    return table
