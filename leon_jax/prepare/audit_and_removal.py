"""Questions to a prepared folder, and taking documents out of it."""

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from leon_jax.config import UserError
from leon_jax.data import records
from leon_jax.prepare import folder_lock, gather
from leon_jax.prepare.data_card import write_card
from leon_jax.prepare.shard_encoding import line
from leon_jax.retrieval.mining import NONE
from leon_jax.retrieval.neighbour_table import Neighbours
from leon_jax.retrieval.prepared_folder import (
    MANIFEST,
    TRAIN,
    PreparedFolder,
    read_removed,
    write_removed,
)
from leon_jax.retrieval.vector_index import save_rows

_ROWS = ("vectors.npy", "variants.npy")  # one row a document, and nothing that points elsewhere


def audit(folder: str | os.PathLike, key: str) -> list[dict[str, Any]]:
    """All that a prepared folder knows of a key.

    Returns:
      For each document with this key: its listing, `text`, `split`, `row`, `shard`, `input` (where
      its source says it came from) and `neighbours` (by modality: key, source and score, the best
      first).
      For each record with this key that is not used: `shard`, `input`, `reason` and `detail`.

    Raises:
      UserError: the folder is not a prepared one, or knows nothing of the key.
    """
    prepared = PreparedFolder(folder)
    found: list[dict[str, Any]] = []
    for split in prepared.manifest["splits"]:
        table = prepared.neighbours(split)
        shards = prepared.shards(split)
        ends = np.cumsum([*shards.values()])
        for row, document in enumerate(prepared.listing(split)):
            if document.get("key") == key:
                shard = [*shards][int(np.searchsorted(ends, row, side="right"))]
                text = prepared.records(split, pixels=False)[row].text
                place = {"split": split, "row": row, "shard": shard}
                found.append({"key": key, "text": text, **document, **place})
                found[-1]["neighbours"] = table[row]
    wanted = {
        int(row)
        for document in found
        for modality in ("text", "image")
        for row in document["neighbours"][f"by_{modality}_ids"]
    }
    names = {row: d for row, d in enumerate(prepared.listing(TRAIN)) if row in wanted}
    for document in found:
        document["neighbours"] = {
            modality: [
                {"key": names[row]["key"], "source": names[row]["source"], "score": score}
                for row, score in zip(
                    document["neighbours"][f"by_{modality}_ids"].tolist(),
                    document["neighbours"][f"by_{modality}_scores"].tolist(),
                    strict=True,
                )
                if row != NONE
            ]
            for modality in ("text", "image")
        }
    for path in sorted(prepared.folder.glob("*.rejects.jsonl")):
        shard = path.name.removesuffix(".rejects.jsonl")
        found += [r | {"shard": shard} for r in gather.read_lines(path) if r["key"] == key]
    if not found:
        raise UserError(f"{prepared.folder} knows no document with the key {key!r}")
    for document in found:
        document["input"] = prepared.manifest["inputs"].get(document["shard"])
    return found


def read_keys(path: str | os.PathLike) -> set[tuple[str, str]]:
    """Keys to remove, one a line: KEY, or SOURCE, a tab and KEY; as (source or "", key).

    Raises:
      UserError: the file cannot be read, or names nothing.
    """
    try:
        # Not `splitlines`, which cuts at characters that a key may hold.
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
        raise UserError(f"{os.fspath(path)} names no keys; write one a line")
    return keys


def remove(folder: str | os.PathLike, keys: set[tuple[str, str]]) -> tuple[int, list[str]]:
    """Takes documents out of records, listings, vectors, variants and neighbour tables, for good.

    `leon_jax.prepare.prepare` does not bring them back when it replaces the folder, nor what has
    one of these keys and was not used so far.

    A new folder is made beside the old one, of links to the files that stay as they are, and takes
    its place when it is complete.

    Args:
      folder: a prepared folder.
      keys: (source, key); an empty source means every source.

    Returns:
      How many documents were removed, and the keys that no document had.

    Raises:
      UserError: the folder is not a prepared one, or nothing would be left of train.
    """
    folder = pathlib.Path(folder).resolve()
    if not folder.parent.is_dir():
        raise UserError(f"there is no folder {folder}")
    with folder_lock.hold(folder):
        try:
            return _remove(folder, keys)
        except OSError as error:
            reason = error.strerror or "the file system refuses it"
            raise UserError(f"removing from {folder} stopped: {reason}; it is as it was") from error


def _remove(folder: pathlib.Path, keys: set[tuple[str, str]]) -> tuple[int, list[str]]:
    new = folder_lock.beside(folder, "removing")
    prepared = PreparedFolder(folder)
    masks, seen = _masks(prepared, keys)
    unknown = sorted(key for source, key in keys if (source, key) not in seen)
    gone = sum(int((~mask).sum()) for mask in masks.values())
    removed = read_removed(folder) | keys
    if not gone:
        write_removed(folder, removed)
        return 0, unknown
    kept = np.concatenate([masks[shard] for shard in prepared.shards(TRAIN)])
    if not kept.any():
        raise UserError(f"no document of {TRAIN} would be left; remove the folder instead")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    # Old row to new row; what is gone, and NONE at the end, to NONE.
    rows = np.append(np.where(kept, np.cumsum(kept) - 1, NONE), NONE).astype(np.int32)
    for shard, mask in masks.items():
        _copy_shard(folder, new, shard, mask, rows)
    for path in folder.glob("*.jsonl"):  # of shards that have no documents
        if not (new / path.name).exists():
            shutil.copyfile(path, new / path.name)
    manifest = dict(prepared.manifest)
    manifest["shards"] = {
        split: {s: int(masks[s].sum()) for s in shards if masks[s].any()}
        for split, shards in manifest["shards"].items()
    }
    manifest["splits"] = {s: sum(shards.values()) for s, shards in manifest["shards"].items()}
    manifest["counts"] = {
        split: gather.count(new, [s for s in manifest["inputs"] if s.rpartition("-")[0] == split])
        for split in manifest["splits"]
    }
    (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    write_removed(new, removed)
    write_card(new)
    folder_lock.replace(folder, new)
    return gone, unknown


def _masks(
    prepared: PreparedFolder, keys: set[tuple[str, str]]
) -> tuple[dict[str, np.ndarray], set[tuple[str, str]]]:
    """Which documents of every shard stay, and which of the keys were met."""
    masks: dict[str, np.ndarray] = {}
    seen: set[tuple[str, str]] = set()
    for split in prepared.manifest["splits"]:
        listing = prepared.listing(split)
        for shard, count in prepared.shards(split).items():
            mask = np.ones(count, bool)
            for row, document in zip(range(count), listing, strict=False):
                met = gather.goes_by(document, keys)
                seen |= met
                mask[row] = not met
            masks[shard] = mask
    return masks, seen


def _copy_shard(
    folder: pathlib.Path, new: pathlib.Path, shard: str, mask: np.ndarray, rows: np.ndarray
) -> None:
    def place(ending: str) -> tuple[pathlib.Path, pathlib.Path]:
        return folder / f"{shard}.{ending}", new / f"{shard}.{ending}"

    kept = np.flatnonzero(mask)
    listing, new_listing = place("documents.jsonl")
    rejects, new_rejects = place("rejects.jsonl")
    lines = listing.read_text(encoding="utf-8").splitlines(keepends=True)
    new_listing.write_text("".join(lines[row] for row in kept), encoding="utf-8")
    more = "".join(
        line({"key": json.loads(lines[row])["key"], "reason": "removed_by_request", "detail": ""})
        for row in np.flatnonzero(~mask)
    )
    new_rejects.write_text(rejects.read_text(encoding="utf-8") + more, encoding="utf-8")
    if not len(kept):
        return
    source, target = place("array_record")
    if mask.all():
        _link(source, target)
    else:
        records.copy(source, target, kept)
    for ending in _ROWS:
        source, target = place(ending)
        if source.exists() and mask.all():
            _link(source, target)
        elif source.exists():
            save_rows(target, np.load(source, mmap_mode="r")[kept])
    source, target = place("neighbours.npy")
    save_rows(target, renumbered(Neighbours.open([source]).shards[0][kept], rows))


def renumbered(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A table of neighbours whose ids are old rows, with new ones; what is gone leaves no gap.

    Args:
      table: of `leon_jax.retrieval.neighbour_table.row_type`.
      rows: old row to new row, NONE for what is gone; the last one stands for NONE.
    """
    new = np.empty_like(table)
    for modality in ("text", "image"):
        ids = rows[table[f"by_{modality}_ids"]]
        scores = np.where(ids == NONE, -np.inf, table[f"by_{modality}_scores"])
        order = np.argsort(ids == NONE, axis=1, kind="stable")
        new[f"by_{modality}_ids"] = np.take_along_axis(ids, order, 1)
        new[f"by_{modality}_scores"] = np.take_along_axis(scores, order, 1)
    return new


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
