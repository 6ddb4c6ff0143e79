"""Gathers shards into the files of a folder, without duplicate documents.

If a train document duplicates a held-out document, the train document is dropped.
"""

import collections
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from leon_jax.config import UserError
from leon_jax.data import records
from leon_jax.prepare import duplicates, splitting
from leon_jax.prepare.config import HELD_OUT, TRAIN, PrepareConfig
from leon_jax.prepare.shard_encoding import (
    DOCUMENTS,
    RECORDS,
    REJECTS,
    ROWS,
    Shard,
    count_lines,
    line,
)
from leon_jax.retrieval.exact_search import NONE
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

_KEEP, _DECISIONS = "keep.npy", "fate.npy"
# For each field: how many different values are counted, and how many are listed.
_MAX_COUNTED, _MAX_LISTED = 100_000, 1000
OTHERS = "(others)"


def gather(
    config: PrepareConfig,
    parts: pathlib.Path,
    shards: Sequence[Shard],
    final: pathlib.Path,
    removed: Collection[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Writes the records, listings, rejects and vectors of all shards.

    Args:
      config: the configuration, with the rules for duplicates.
      parts: folder that holds one complete folder per shard.
      shards: all shards, in the order of `plan`.
      final: folder to write to; existing files are not written again.
      removed: (source, key) pairs of documents to leave out; the source "" matches every source.

    Returns:
      `splits`, `shards` and `counts` of the manifest.

    Raises:
      UserError: no document of train can be used.
    """
    part_names = {
        split: [shard.name for shard in shards if shard.name.rpartition("-")[0] == split]
        for split in config.splits
    }
    held_out_names = {shard.name: shard.held_out_name for shard in shards if shard.held_out_name}
    by_split = {split: list(names) for split, names in part_names.items()}
    if held_out_names:
        by_split[HELD_OUT] = sorted([*part_names[HELD_OUT], *held_out_names.values()])
    ordered = [name for split in config.splits[1:] for name in part_names[split]]
    num_held_out_parts = len(ordered)
    ordered += part_names[TRAIN]
    lengths = [count_lines(parts / name / DOCUMENTS) for name in ordered]
    # Decide once: a restarted run must agree with the files that a killed run wrote.
    if (parts / _DECISIONS).exists():
        decisions = duplicates.Decisions.open(parts / _DECISIONS)
    else:
        decisions = decide(config, parts, ordered, lengths, sum(lengths[:num_held_out_parts]))
        decisions.save(parts / _DECISIONS)
    is_held_out = _held_out_documents(config, parts, ordered, lengths, held_out_names, decisions)
    # Remove last, so that duplicates of a removed document are dropped as well.
    removed_rows = [
        row for row in _matching_rows(parts, ordered, removed) if not decisions.rows["reason"][row]
    ]
    decisions.drop(np.array(removed_rows, np.int64), "removed_by_request", score=0)
    starts = np.cumsum([0, *lengths])
    names = _duplicated_keys(parts, ordered, starts, decisions)
    counts: dict[str, int] = {}
    keep = decisions.keep
    for name, start, length in zip(ordered, starts, lengths, strict=False):
        rows = slice(start, start + length)
        if name in held_out_names:
            target, mask = held_out_names[name], keep[rows] & is_held_out[rows]
            _write_shard(parts / name, final, target, mask)
            counts[target] = int(mask.sum())
        mask = keep[rows] & ~is_held_out[rows]
        save_rows(parts / name / _KEEP, mask)
        rejects = _rejects(parts / name, keep[rows], int(start), decisions, names)
        _write_shard(parts / name, final, name, mask, rejects)
        counts[name] = int(mask.sum())
    if not any(counts[name] for name in by_split[TRAIN]):
        reasons = _reasons(final / f"{name}.rejects.jsonl" for name in by_split[TRAIN])
        summary = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        message = f"no document of {TRAIN} can be used ({summary or 'its sources are empty'})"
        paths = [final / f"{name}.{REJECTS}" for name in by_split[TRAIN]]
        for first in itertools.islice(itertools.chain.from_iterable(map(read_lines, paths)), 1):
            message += f"; the first, {first['key']}: {first['detail'] or first['reason']}"
            message += f"; for the others see {final}/{TRAIN}-*.{REJECTS}"
        raise UserError(message)
    # Too few documents to hold some out: there is no such split.
    splits = [
        split
        for split in config.splits
        if split != HELD_OUT or part_names[split] or any(counts[name] for name in by_split[split])
    ]
    return {
        "splits": {split: sum(counts[name] for name in by_split[split]) for split in splits},
        "shards": {
            split: {name: counts[name] for name in by_split[split] if counts[name]}
            for split in splits
        },
        "counts": {split: count(final, by_split[split]) for split in splits},
    }


def decide(
    config: PrepareConfig,
    parts: pathlib.Path,
    shards: Sequence[str],
    lengths: Sequence[int],
    held_out: int,
) -> duplicates.Decisions:
    """Decides which documents are kept and which are dropped as duplicates.

    Args:
      config: the configuration, with the rules for duplicates.
      parts: folder that holds one complete folder per shard.
      shards: names of the shards, those of held-out splits first.
      lengths: number of documents of each shard.
      held_out: number of documents of held-out splits.
    """
    rules = config.duplicates
    decisions = duplicates.Decisions(sum(lengths))
    if not len(decisions.rows):
        return decisions

    def load(name: str) -> np.ndarray:
        return np.concatenate([np.load(parts / shard / f"{name}.npy") for shard in shards])

    duplicates.drop_exact(decisions, load("key"), "key_repeated")
    if rules.exact:
        duplicates.drop_exact(decisions, load("content"), "copy_exact")
    if not config.has_models:
        if held_out:
            duplicates.drop_held_out_pictures(decisions, load("picture"), held_out)
        return decisions
    images = VectorIndex.open([parts / shard / "image.npy" for shard in shards])
    if rules.evaluation is not None and held_out:
        duplicates.drop_evaluation(decisions, images, held_out, rules.evaluation)
    if rules.near is not None:
        # Shards that an older version encoded have no digests of images.
        has_pictures = all((parts / shard / "picture.npy").exists() for shard in shards)
        pictures = load("picture") if has_pictures else None
        duplicates.drop_near(decisions, images, held_out, rules.near, pictures)
    return decisions


def _held_out_documents(
    config: PrepareConfig,
    parts: pathlib.Path,
    shards: Sequence[str],
    lengths: Sequence[int],
    held_out_names: Mapping[str, str],
    decisions: duplicates.Decisions,
) -> np.ndarray:
    """Returns bool[n], True for the kept documents of train shards that are held out."""
    mask = np.zeros(sum(lengths), bool)
    can_be_held_out = np.repeat([name in held_out_names for name in shards], lengths)
    rows = np.flatnonzero(can_be_held_out.astype(bool) & decisions.keep)
    if len(rows):
        groups, pictures = (
            np.concatenate([np.load(parts / shard / f"{name}.npy") for shard in shards])[rows]
            for name in ("group", "picture")
        )
        mask[rows] = splitting.held_out(groups, pictures, config.held_out)
    return mask


def query_vectors(parts: pathlib.Path, shard: str) -> dict[str, np.ndarray]:
    """Reads the query vectors of the kept documents of a shard.

    Returns:
      float16[n, d] unit rows by view: "text", "image" and "document".
    """
    keep = np.load(parts / shard / _KEEP)
    return {
        name: np.load(parts / shard / f"{name}.npy", mmap_mode="r")[keep]
        for name in ("text", "image", "document")
    }


def image_index(parts: pathlib.Path, shards: Iterable[str]) -> VectorIndex:
    """Opens the image embeddings of the kept documents of shards, one row per document."""
    paths = []
    for shard in shards:
        path, keep = parts / shard / "image.npy", np.load(parts / shard / _KEEP)
        if not keep.all():
            rows = np.load(path, mmap_mode="r")[keep]
            path = parts / shard / "kept_image.npy"
            save_rows(path, rows)
        paths.append(path)
    return VectorIndex.open(paths)


def source_numbers(prepared: PreparedFolder) -> np.ndarray:
    """Returns int32[n], the number of the source of each train document."""
    numbers: dict[str, int] = {}
    sources = (document["source"] for document in prepared.listing(TRAIN))
    return np.fromiter((numbers.setdefault(name, len(numbers)) for name in sources), np.int32)


def picture_numbers(prepared: PreparedFolder) -> dict[str, np.ndarray] | None:
    """Returns int32[n] by split: documents have equal numbers if their stored images are equal.

    Returns None if the listings of an older version do not tell.
    """
    numbers: dict[str, int] = {}
    by_split = {}
    for split in prepared.splits:
        pictures = [document.get("picture", "") for document in prepared.listing(split)]
        if "" in pictures:
            return None
        by_split[split] = np.array(
            [numbers.setdefault(picture, len(numbers)) for picture in pictures], np.int32
        )
    return by_split


def count(folder: pathlib.Path, shards: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts documents by licence, source, language, size and credit line, and rejects by reason.

    If a field has too many different values, the rarest are counted together as `OTHERS`.

    Args:
      folder: folder with the listings and rejects.
      shards: names of the shards of one split.

    Returns:
      Counts by value for "licence", "source", "language", "size", "credit" and "rejected".
    """
    counts: dict[str, collections.Counter[str]] = {
        name: collections.Counter() for name in ("licence", "source", "language", "size", "credit")
    }
    for shard in shards:
        for document in read_lines(folder / f"{shard}.{DOCUMENTS}"):
            fields = document | {
                "size": size_class(min(document["size"])),
                "credit": document["attribution"] or f"{document['source']} (no credit line)",
            }
            for name, counter in [*counts.items()]:
                counter[fields[name]] += 1
                if len(counter) > _MAX_COUNTED:
                    counts[name] = collections.Counter(_largest(counter, _MAX_COUNTED // 2))
    rejected = _reasons(folder / f"{shard}.{REJECTS}" for shard in shards)
    ordered = {name: _largest(counter, _MAX_LISTED) for name, counter in counts.items()}
    return ordered | {"rejected": dict(sorted(rejected.items()))}


def _largest(counter: collections.Counter[str], size: int) -> dict[str, int]:
    """Returns the `size` largest counts, sorted by name, and the sum of the others as `OTHERS`."""
    others = counter.pop(OTHERS, 0)
    ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    others += sum(count for _, count in ranked[size:])
    return dict(sorted(ranked[:size])) | ({OTHERS: others} if others else {})


def size_class(side: int) -> str:
    """Returns the size class of an image: the range between powers of two that holds `side`.

    Args:
      side: the shorter side of the image in pixels, at least 1.

    Returns:
      For example "256 to 511".
    """
    low = 1 << (side.bit_length() - 1)
    return f"{low} to {2 * low - 1}"


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file that `leon prepare` wrote."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            yield json.loads(text)


def _write_shard(
    part: pathlib.Path, final: pathlib.Path, name: str, mask: np.ndarray, rejects: str = ""
) -> None:
    """Writes the files of one shard, the records last: their presence marks a complete shard.

    Args:
      part: the folder of the shard.
      final: the folder to write to.
      name: name of the written shard.
      mask: bool[n], True for the documents of the part to write.
      rejects: the lines of the rejected documents.
    """
    path = final / f"{name}.array_record"
    rows = np.flatnonzero(mask)
    if path.exists():
        return
    with (part / DOCUMENTS).open(encoding="utf-8") as file:
        lines = list(file)
    _write_text(final / f"{name}.{DOCUMENTS}", "".join(lines[row] for row in rows))
    _write_text(final / f"{name}.{REJECTS}", rejects)
    if not len(rows):
        return
    if name.rpartition("-")[0] == TRAIN and (part / "document.npy").exists():
        vectors = np.load(part / "document.npy", mmap_mode="r")
        save_rows(final / f"{name}.vectors.npy", vectors[rows])
    if (part / ROWS).exists():
        save_rows(final / f"{name}.rows.npy", np.load(part / ROWS)[rows])
    if mask.all():
        shutil.copyfile(part / RECORDS, path.with_name(path.name + ".tmp"))
        os.replace(path.with_name(path.name + ".tmp"), path)
    else:
        records.copy(part / RECORDS, path, rows)


def _rejects(
    part: pathlib.Path,
    keep: np.ndarray,
    start: int,
    decisions: duplicates.Decisions,
    names: dict[int, str],
) -> str:
    """Returns the lines of a shard's rejected records and dropped documents.

    Args:
      part: the folder of the shard.
      keep: bool[n], False for the dropped documents of the shard.
      start: row of the shard's first document among all documents.
      decisions: the decisions about all documents.
      names: key and source, by row, of the documents that dropped ones duplicate.
    """
    with (part / DOCUMENTS).open(encoding="utf-8") as file:
        lines = list(file)
    rejects = (part / REJECTS).read_text(encoding="utf-8")
    for row in np.flatnonzero(~keep).tolist():
        reason = decisions.reason(start + row)
        because = int(decisions.rows["because"][start + row])
        detail = f"it repeats {names[because]}" if because >= 0 else ""
        if reason in ("copy_near", "copy_of_evaluation"):
            detail += f", similarity {decisions.rows['score'][start + row]:.3f}"
        rejects += line(
            {
                "key": json.loads(lines[row])["key"],
                "reason": reason,
                "detail": detail,
            }
        )
    return rejects


def _matching_rows(
    parts: pathlib.Path, shards: Sequence[str], keys: Collection[tuple[str, str]]
) -> Iterator[int]:
    """Yields the rows of the documents that `keys` name, as in `matching_keys`."""
    if keys:
        listings = (read_lines(parts / shard / DOCUMENTS) for shard in shards)
        for row, document in enumerate(itertools.chain.from_iterable(listings)):
            if matching_keys(document, keys):
                yield row


def matching_keys(
    document: Mapping[str, Any], keys: Collection[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Returns the (source, key) pairs of `keys` that name a listed document.

    The source "" matches every source.
    """
    key = document.get("key", "")
    return {pair for pair in (("", key), (document.get("source", ""), key)) if pair in keys}


def _duplicated_keys(
    parts: pathlib.Path, shards: Sequence[str], starts: np.ndarray, decisions: duplicates.Decisions
) -> dict[int, str]:
    """Returns the key and source, by row, of each document that a dropped one duplicates."""
    rows = np.unique(decisions.rows["because"])
    rows = rows[rows != NONE]
    keys: dict[int, str] = {}
    for shard, start, stop in zip(shards, starts, starts[1:], strict=False):
        shard_rows = rows[(rows >= start) & (rows < stop)]
        if len(shard_rows):
            lines = (parts / shard / DOCUMENTS).read_text(encoding="utf-8").splitlines()
            for row in shard_rows.tolist():
                document = json.loads(lines[row - start])
                keys[row] = f"{document['key']} of {document['source']}"
    return keys


def _reasons(paths: Iterable[pathlib.Path]) -> collections.Counter[str]:
    return collections.Counter(
        reject["reason"] for path in paths if path.exists() for reject in read_lines(path)
    )


def _write_text(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
