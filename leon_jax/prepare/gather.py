"""Encoded shards become the files of a prepared folder, without what repeats.

Documents that are held out come first where two repeat each other: what is dropped is dropped from
train.
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
from leon_jax.prepare import duplicates
from leon_jax.prepare.config import TRAIN, PrepareConfig
from leon_jax.prepare.shard_encoding import (
    DOCUMENTS,
    RECORDS,
    REJECTS,
    Shard,
    count_lines,
    line,
)
from leon_jax.retrieval.mining import NONE
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

_KEEP, _FATE = "keep.npy", "fate.npy"
# Of each kind of count, so many different values are told apart, and so many are listed.
_MOST, _LISTED = 100_000, 1000
OTHERS = "(others)"


def gather(
    config: PrepareConfig,
    parts: pathlib.Path,
    shards: Sequence[Shard],
    final: pathlib.Path,
    removed: Collection[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Writes the records, listings, rejects and vectors of all shards that have documents.

    Args:
      config: what counts as a repetition.
      parts: the folder of the shards' folders, all done.
      shards: in the order of `plan`.
      final: where the files go; those that are there are left as they are.
      removed: documents to leave out, by source (or "" for any) and key.

    Returns:
      `splits`, `shards` and `counts` of the manifest.

    Raises:
      UserError: nothing is left of train.
    """
    by_split = {
        split: [shard.name for shard in shards if shard.name.rpartition("-")[0] == split]
        for split in config.splits
    }
    ordered = [name for split in config.splits[1:] for name in by_split[split]]
    held_out = len(ordered)
    ordered += by_split[TRAIN]
    lengths = [count_lines(parts / name / DOCUMENTS) for name in ordered]
    # Judged once: files that a killed run left behind follow the first judgement.
    if (parts / _FATE).exists():
        fate = duplicates.Fate.open(parts / _FATE)
    else:
        fate = judge(config, parts, ordered, lengths, sum(lengths[:held_out]))
        fate.save(parts / _FATE)
    # Last: what repeats a document that was removed stays away as well.
    removed_rows = [row for row in _named(parts, ordered, removed) if not fate.rows["reason"][row]]
    fate.drop(np.array(removed_rows, np.int64), "removed_by_request", score=0)
    starts = np.cumsum([0, *lengths])
    names = _repeated_keys(parts, ordered, starts, fate)
    kept: dict[str, int] = {}
    keep = fate.keep
    for name, start, length in zip(ordered, starts, lengths, strict=False):
        mask = keep[start : start + length]
        save_rows(parts / name / _KEEP, mask)
        _write_shard(parts / name, final, mask, int(start), fate, names)
        kept[name] = int(mask.sum())
    if not any(kept[name] for name in by_split[TRAIN]):
        reasons = _reasons(final / f"{name}.rejects.jsonl" for name in by_split[TRAIN])
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        said = f"no document of {TRAIN} can be used ({why or 'its sources are empty'})"
        paths = [final / f"{name}.{REJECTS}" for name in by_split[TRAIN]]
        for first in itertools.islice(itertools.chain.from_iterable(map(read_lines, paths)), 1):
            said += f"; the first, {first['key']}: {first['detail'] or first['reason']}"
            said += f"; for the others see {final}/{TRAIN}-*.{REJECTS}"
        raise UserError(said)
    return {
        "splits": {split: sum(kept[n] for n in by_split[split]) for split in config.splits},
        "shards": {
            split: {n: kept[n] for n in by_split[split] if kept[n]} for split in config.splits
        },
        "counts": {split: count(final, by_split[split]) for split in config.splits},
    }


def judge(
    config: PrepareConfig,
    parts: pathlib.Path,
    shards: Sequence[str],
    lengths: Sequence[int],
    held_out: int,
) -> duplicates.Fate:
    """Which documents are kept; the first `held_out` of them are of other splits than train."""
    rules = config.duplicates
    fate = duplicates.Fate(sum(lengths))
    if not len(fate.rows):
        return fate

    def load(name: str) -> np.ndarray:
        return np.concatenate([np.load(parts / shard / f"{name}.npy") for shard in shards])

    duplicates.drop_repeated(fate, load("key"), "key_repeated")
    if rules.exact:
        duplicates.drop_repeated(fate, load("content"), "copy_exact")
    images = VectorIndex.open([parts / shard / "image.npy" for shard in shards])
    if rules.evaluation is not None and held_out:
        duplicates.drop_evaluation(fate, images, held_out, rules.evaluation)
    if rules.near is not None:
        duplicates.drop_near(fate, images, held_out, rules.near)
    return fate


def queries(parts: pathlib.Path, shard: str) -> dict[str, np.ndarray]:
    """The vectors by which the documents of a finished shard search, float16[n, d] a view."""
    keep = np.load(parts / shard / _KEEP)
    return {
        name: np.load(parts / shard / f"{name}.npy", mmap_mode="r")[keep]
        for name in ("text", "image", "document")
    }


def pictures(parts: pathlib.Path, shards: Iterable[str]) -> VectorIndex:
    """The pictures of the documents of finished shards, rows as the documents are numbered."""
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
    """A number for the source of every train document, int32[n]."""
    numbers: dict[str, int] = {}
    sources = (document["source"] for document in prepared.listing(TRAIN))
    return np.fromiter((numbers.setdefault(name, len(numbers)) for name in sources), np.int32)


def count(folder: pathlib.Path, shards: Sequence[str]) -> dict[str, dict[str, int]]:
    """How many documents of a split have each licence, source, language, size and credit line.

    And why how many records are not used. Where there is too much to tell apart, the rarest by then
    are counted together, as `OTHERS`.
    """
    counts: dict[str, collections.Counter[str]] = {
        name: collections.Counter() for name in ("licence", "source", "language", "size", "credit")
    }
    for shard in shards:
        for document in read_lines(folder / f"{shard}.{DOCUMENTS}"):
            found = document | {
                "size": size_class(min(document["size"])),
                "credit": document["attribution"] or f"{document['source']} (no credit line)",
            }
            for name, counter in [*counts.items()]:
                counter[found[name]] += 1
                if len(counter) > _MOST:
                    counts[name] = collections.Counter(_largest(counter, _MOST // 2))
    rejected = _reasons(folder / f"{shard}.{REJECTS}" for shard in shards)
    ordered = {name: _largest(counter, _LISTED) for name, counter in counts.items()}
    return ordered | {"rejected": dict(sorted(rejected.items()))}


def _largest(counter: collections.Counter[str], most: int) -> dict[str, int]:
    """The largest counts by name, the others in one."""
    others = counter.pop(OTHERS, 0)
    listed = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    others += sum(count for _, count in listed[most:])
    return dict(sorted(listed[:most])) | ({OTHERS: others} if others else {})


def size_class(side: int) -> str:
    """A picture's class by its shorter side in pixels: from one power of two up to the next."""
    low = 1 << (side.bit_length() - 1)
    return f"{low} to {2 * low - 1}"


def read_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file of ours."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            yield json.loads(text)


def _write_shard(
    part: pathlib.Path,
    final: pathlib.Path,
    keep: np.ndarray,
    start: int,
    fate: duplicates.Fate,
    names: dict[int, str],
) -> None:
    """The files of one shard; the records are written last, so their presence says it is done."""
    path = final / f"{part.name}.array_record"
    rows = np.flatnonzero(keep)
    if path.exists():
        return
    with (part / DOCUMENTS).open(encoding="utf-8") as file:
        lines = list(file)
    _write_text(final / f"{part.name}.{DOCUMENTS}", "".join(lines[row] for row in rows))
    rejects = (part / REJECTS).read_text(encoding="utf-8")
    for row in np.flatnonzero(~keep).tolist():
        because, reason = int(fate.rows["because"][start + row]), fate.reason(start + row)
        detail = f"it repeats {names[because]}" if because >= 0 else ""
        if reason in ("copy_near", "copy_of_evaluation"):
            detail += f", similarity {fate.rows['score'][start + row]:.3f}"
        rejects += line(
            {
                "key": json.loads(lines[row])["key"],
                "reason": reason,
                "detail": detail,
            }
        )
    _write_text(final / f"{part.name}.{REJECTS}", rejects)
    if not len(rows):
        return
    if part.name.rpartition("-")[0] == TRAIN:
        vectors = np.load(part / "document.npy", mmap_mode="r")
        save_rows(final / f"{part.name}.vectors.npy", vectors[rows])
    if keep.all():
        shutil.copyfile(part / RECORDS, path.with_name(path.name + ".tmp"))
        os.replace(path.with_name(path.name + ".tmp"), path)
    else:
        records.copy(part / RECORDS, path, rows)


def _named(
    parts: pathlib.Path, shards: Sequence[str], removed: Collection[tuple[str, str]]
) -> Iterator[int]:
    """The rows of the documents that go by these sources (or "" for any) and keys."""
    if removed:
        lists = (read_lines(parts / shard / DOCUMENTS) for shard in shards)
        for row, document in enumerate(itertools.chain.from_iterable(lists)):
            if goes_by(document, removed):
                yield row


def goes_by(
    document: Mapping[str, Any], names: Collection[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Those of `names`, each a source (or "" for any) and a key, that are a listed document's."""
    key = document.get("key", "")
    return {name for name in (("", key), (document.get("source", ""), key)) if name in names}


def _repeated_keys(
    parts: pathlib.Path, shards: Sequence[str], starts: np.ndarray, fate: duplicates.Fate
) -> dict[int, str]:
    """The keys and sources of the documents that others repeat, by row."""
    rows = np.unique(fate.rows["because"])
    rows = rows[rows != NONE]
    keys: dict[int, str] = {}
    for shard, start, stop in zip(shards, starts, starts[1:], strict=False):
        here = rows[(rows >= start) & (rows < stop)]
        if len(here):
            lines = (parts / shard / DOCUMENTS).read_text(encoding="utf-8").splitlines()
            for row in here.tolist():
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
