"""Looks up documents by their keys, and removes documents from folders and their encodings."""

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data import records
from leon_jax.data.document_folder import ENCODED, MANIFEST, PREPARED_FORMAT, TRAIN, DocumentFolder
from leon_jax.prepare import folder_lock, gather
from leon_jax.prepare.data_card import write_card
from leon_jax.prepare.shard_encoding import line
from leon_jax.retrieval.exact_search import NONE
from leon_jax.retrieval.neighbour_table import Neighbours
from leon_jax.retrieval.prepared_folder import (
    PreparedFolder,
    encodings,
    read_removed,
    write_removed,
)
from leon_jax.retrieval.vector_index import save_rows

# Arrays with one row per document that hold no row numbers, so rows can be copied unchanged.
_ROWS = ("vectors.npy", "variants.npy")


def audit(folder: str | os.PathLike, key: str) -> list[dict[str, Any]]:
    """Returns everything that a folder and its encodings record about a key.

    Args:
      folder: a documents folder or a prepared folder.
      key: the key.

    Returns:
      For each document with this key: the fields of its listing, `text`, `split`, `row`, `shard`,
      `input` (the source shard it was read from) and, in a prepared folder, `neighbours` (per
      modality a list of key, source and score, best first).
      For each rejected record with this key: `key`, `shard`, `input`, `reason` and `detail`.
      What an encoding of a documents folder records also has `encoding`, the encoding's name.

    Raises:
      UserError: the folder is neither, or holds no record with this key.
    """
    documents = DocumentFolder(folder)
    entries = _audit(documents, key)
    for encoding in encodings(documents.address):
        entries += [
            {**entry, "encoding": encoding.name} for entry in _audit(DocumentFolder(encoding), key)
        ]
    if not entries:
        raise UserError(f"{documents.folder} holds no document with the key {key!r}")
    return entries


def _audit(documents: DocumentFolder, key: str) -> list[dict[str, Any]]:
    """Returns what one folder records about a key."""
    entries: list[dict[str, Any]] = []
    has_neighbours = documents.manifest["format"] == PREPARED_FORMAT
    for split in documents.splits:
        table = PreparedFolder(documents.folder).neighbours(split) if has_neighbours else None
        shards = documents.shards(split)
        ends = np.cumsum([*shards.values()])
        for row, document in enumerate(documents.listing(split)):
            if document.get("key") == key:
                shard = [*shards][int(np.searchsorted(ends, row, side="right"))]
                text = documents.records(split, pixels=False)[row].text
                location = {"split": split, "row": row, "shard": shard}
                entries.append({"key": key, "text": text, **document, **location})
                if table is not None:
                    entries[-1]["neighbours"] = table[row]
    if has_neighbours:
        _name_neighbours(documents, entries)
    for path in sorted(documents.folder.glob("*.rejects.jsonl")):
        shard = path.name.removesuffix(".rejects.jsonl")
        rejects = gather.read_lines(path)
        entries += [reject | {"shard": shard} for reject in rejects if reject["key"] == key]
    for entry in entries:
        entry["input"] = documents.manifest["inputs"].get(entry["shard"])
    return entries


def _name_neighbours(documents: DocumentFolder, entries: list[dict[str, Any]]) -> None:
    """Replaces the row of the neighbour table in each entry by keys, sources and scores."""
    neighbour_rows = {
        int(row)
        for entry in entries
        for modality in ("text", "image")
        for row in entry["neighbours"][f"by_{modality}_ids"]
    }
    neighbours = {
        row: document
        for row, document in enumerate(documents.listing(TRAIN))
        if row in neighbour_rows
    }
    for entry in entries:
        entry["neighbours"] = {
            modality: [
                {"key": neighbours[row]["key"], "source": neighbours[row]["source"], "score": score}
                for row, score in zip(
                    entry["neighbours"][f"by_{modality}_ids"].tolist(),
                    entry["neighbours"][f"by_{modality}_scores"].tolist(),
                    strict=True,
                )
                if row != NONE
            ]
            for modality in ("text", "image")
        }


def read_keys(path: str | os.PathLike) -> set[tuple[str, str]]:
    """Reads the keys of documents to remove.

    Each line of the file is KEY, or SOURCE, a tab and KEY.

    Returns:
      (source, key) pairs. The source is "" where the line names none.

    Raises:
      UserError: the file cannot be read, or holds no key.
    """
    try:
        # `splitlines` would also split at characters that are valid inside a key.
        lines = pathlib.Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the keys in {os.fspath(path)}: {reason}") from error
    keys = set()
    for text in lines:
        source, _, key = text.removesuffix("\r").rpartition("\t")
        if key.strip():
            keys.add((source, key))
    if not keys:
        raise UserError(f"{os.fspath(path)} holds no keys; write one key per line")
    return keys


def remove(folder: str | os.PathLike, keys: set[tuple[str, str]]) -> tuple[int, list[str]]:
    """Permanently removes documents from all files of a folder and of its encodings.

    The records, listings, vectors, image variants and neighbour tables change. The folder remembers
    the keys, so `leon_jax.prepare.prepare` also leaves these documents out when it rebuilds the
    folder.

    The function builds a new folder beside the old one and hard-links files that do not change.
    It replaces the old folder once the new one is complete.

    Args:
      folder: a documents folder or a prepared folder.
      keys: (source, key) pairs; an empty source matches every source.

    Returns:
      The number of removed documents, and the sorted keys that matched no document.

    Raises:
      UserError: the folder is neither, cannot be written, or would have no train
        documents left.
    """
    if storage.is_bucket(folder):
        raise UserError(
            f"{folder} is in a bucket, where documents cannot be removed; prepare the folder again "
            "without them, or remove them from a copy on a disk"
        )
    folder = pathlib.Path(folder).resolve()
    if not folder.parent.is_dir():
        raise UserError(f"there is no folder {folder}")
    with folder_lock.hold(folder):
        try:
            return _remove(folder, keys)
        except OSError as error:
            reason = error.strerror or "the file system refuses it"
            raise UserError(
                f"removing from {folder} failed: {reason}; the folder is unchanged"
            ) from error


def _remove(folder: pathlib.Path, keys: set[tuple[str, str]]) -> tuple[int, list[str]]:
    new = folder_lock.beside(folder, "removing")
    documents = DocumentFolder(folder)
    masks, seen = _masks(documents, keys)
    unknown = sorted(key for source, key in keys if (source, key) not in seen)
    removed_count = sum(int((~mask).sum()) for mask in masks.values())
    if not removed_count:
        for path in (folder, *encodings(folder)):
            write_removed(path, read_removed(path) | keys)
        return 0, unknown
    shutil.rmtree(new, ignore_errors=True)
    _write_remaining(documents, new, keys, masks)
    for encoding in encodings(folder):
        prepared = PreparedFolder(encoding)
        target = new / ENCODED / encoding.name
        _write_remaining(prepared, target, keys, _masks(prepared, keys)[0], masks)
    folder_lock.replace(folder, new)
    return removed_count, unknown


def _write_remaining(
    documents: DocumentFolder,
    new: pathlib.Path,
    keys: set[tuple[str, str]],
    masks: dict[str, np.ndarray],
    document_masks: dict[str, np.ndarray] | None = None,
) -> None:
    """Writes the folder `new` with the remaining documents.

    Args:
      documents: the folder to copy.
      new: the folder to write.
      keys: the removed (source, key) pairs, which the new folder remembers.
      masks: for each shard a mask of the documents that remain.
      document_masks: for an encoding, the masks of the shards of its documents folder.

    Raises:
      UserError: no train documents would remain.
    """
    keep = np.concatenate([masks[shard] for shard in documents.shards(TRAIN)])
    if not keep.any():
        raise UserError(f"{TRAIN} would have no documents left; delete the folder instead")
    new.mkdir(parents=True)
    # Maps old rows to new rows. Removed rows map to NONE, and so does NONE (-1, the last entry).
    new_rows = np.append(np.where(keep, np.cumsum(keep) - 1, NONE), NONE).astype(np.int32)
    for shard, mask in masks.items():
        _copy_shard(documents.folder, new, shard, mask, new_rows)
        rows_path = documents.folder / f"{shard}.rows.npy"
        if rows_path.exists() and document_masks is not None and mask.any():
            document_mask = document_masks[documents.manifest["inputs"][shard]["shard"]]
            rows = np.cumsum(document_mask)[np.load(rows_path)[mask]] - 1
            save_rows(new / rows_path.name, rows.astype(np.int32))
    for path in documents.folder.glob("*.jsonl"):  # files of shards without documents
        if not (new / path.name).exists():
            shutil.copyfile(path, new / path.name)
    manifest = dict(documents.manifest)
    names = {
        split: [shard for shard in masks if shard.rpartition("-")[0] == split]
        for split in documents.splits
    }
    # The rejects of shards without documents count too.
    for shard in manifest["inputs"]:
        split = shard.rpartition("-")[0]
        if split in names and shard not in names[split]:
            names[split].append(shard)
    manifest["shards"] = {
        split: {s: int(masks[s].sum()) for s in shards if masks[s].any()}
        for split, shards in manifest["shards"].items()
    }
    manifest["splits"] = {s: sum(shards.values()) for s, shards in manifest["shards"].items()}
    manifest["counts"] = {split: gather.count(new, sorted(names[split])) for split in names}
    (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    write_removed(new, read_removed(documents.folder) | keys)
    write_card(new)


def _masks(
    documents: DocumentFolder, keys: set[tuple[str, str]]
) -> tuple[dict[str, np.ndarray], set[tuple[str, str]]]:
    """Returns for each shard a mask of the documents that remain, and the keys that matched."""
    masks: dict[str, np.ndarray] = {}
    seen: set[tuple[str, str]] = set()
    for split in documents.splits:
        listing = documents.listing(split)
        for shard, count in documents.shards(split).items():
            mask = np.ones(count, bool)
            for row, document in zip(range(count), listing, strict=False):
                matches = gather.matching_keys(document, keys)
                seen |= matches
                mask[row] = not matches
            masks[shard] = mask
    return masks, seen


def _copy_shard(
    folder: pathlib.Path, new: pathlib.Path, shard: str, mask: np.ndarray, new_rows: np.ndarray
) -> None:
    """Writes the files of a shard, without the rows that `mask` excludes, into the folder `new`."""

    def paths(suffix: str) -> tuple[pathlib.Path, pathlib.Path]:
        return folder / f"{shard}.{suffix}", new / f"{shard}.{suffix}"

    remaining = np.flatnonzero(mask)
    listing, new_listing = paths("documents.jsonl")
    rejects, new_rejects = paths("rejects.jsonl")
    lines = listing.read_text(encoding="utf-8").splitlines(keepends=True)
    new_listing.write_text("".join(lines[row] for row in remaining), encoding="utf-8")
    removed_lines = "".join(
        line({"key": json.loads(lines[row])["key"], "reason": "removed_by_request", "detail": ""})
        for row in np.flatnonzero(~mask)
    )
    new_rejects.write_text(rejects.read_text(encoding="utf-8") + removed_lines, encoding="utf-8")
    if not len(remaining):
        return
    source, target = paths("array_record")
    if mask.all():
        _link(source, target)
    else:
        records.copy(source, target, remaining)
    for suffix in _ROWS:
        source, target = paths(suffix)
        if source.exists() and mask.all():
            _link(source, target)
        elif source.exists():
            save_rows(target, np.load(source, mmap_mode="r")[remaining])
    source, target = paths("neighbours.npy")
    if source.exists():
        save_rows(target, renumbered(Neighbours.open([source]).shards[0][remaining], new_rows))


def renumbered(table: np.ndarray, new_rows: np.ndarray) -> np.ndarray:
    """Returns a neighbour table with new row numbers; removed neighbours move to the end as NONE.

    Args:
      table: structured [n] of the dtype `leon_jax.retrieval.neighbour_table.row_type`; its ids are
        old row numbers.
      new_rows: int32[rows + 1], the new number of each old row, NONE for removed rows. The last
        entry is NONE, which maps NONE (-1) to itself.

    Returns:
      A table of the same shape and dtype.
    """
    new = np.empty_like(table)
    for modality in ("text", "image"):
        ids = new_rows[table[f"by_{modality}_ids"]]
        scores = np.where(ids == NONE, -np.inf, table[f"by_{modality}_scores"])
        order = np.argsort(ids == NONE, axis=1, kind="stable")
        new[f"by_{modality}_ids"] = np.take_along_axis(ids, order, 1)
        new[f"by_{modality}_scores"] = np.take_along_axis(scores, order, 1)
    return new


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
