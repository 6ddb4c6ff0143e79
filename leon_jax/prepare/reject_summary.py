"""Says which records `leon prepare` rejected, why, and what would accept them."""

import collections
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from leon_jax import storage
from leon_jax.prepare.data_card import MEANINGS
from leon_jax.prepare.gather import read_lines
from leon_jax.prepare.shard_encoding import REJECTS

# What accepts records of a reason. Licences have details of their own.
_REMEDIES = {
    "missing_field": "--text_field=NAME, --image_field=NAME or --caption_from_name",
    "licence_unknown": "--licence=SPDX for records without one",
    "text_too_long": "a larger max_text in a --config",
    "too_many_tokens": "a larger max_tokens in a --config",
    "picture_too_small": "a smaller min_side in a --config",
    "picture_too_narrow": "a larger max_aspect in a --config",
    "copy_exact": "duplicates.exact = False in a --config",
    "copy_near": "duplicates.near in a --config",
    "copy_of_evaluation": "duplicates.evaluation in a --config",
}
_MAX_LICENCES, _MAX_LISTED = 10_000, 5


def lines(folder: str | os.PathLike, manifest: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the summary, none if no record was rejected.

    The first line has the numbers. Each further line has a reason, the most frequent first: its
    number of records, its meaning, what would accept them, and an example.

    Args:
      folder: a documents folder or a prepared folder.
      manifest: its manifest.
    """
    counts: collections.Counter[str] = collections.Counter()
    for tables in manifest["counts"].values():
        counts.update(tables["rejected"])
    if not counts:
        return []
    documents = sum(manifest["splits"].values())
    examples, licences = _details(storage.path(folder))
    result = [f"{counts.total():,} of {documents + counts.total():,} records were rejected:"]
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        result.append(f"  {count:,} {reason}: {MEANINGS[reason]}")
        if reason == "licence_not_allowed":
            result += [
                f"    {number:,}: {detail}" for detail, number in licences.most_common(_MAX_LISTED)
            ]
            if len(licences) > _MAX_LISTED:
                result.append(f"    and {len(licences) - _MAX_LISTED:,} other licences")
            continue
        if reason in _REMEDIES:
            result.append(f"    to accept them: {_REMEDIES[reason]}")
        if reason in examples:
            result.append(f"    for example {examples[reason]}")
    result.append(f"All of them: {storage.path(folder)}/*.{REJECTS}")
    return result


def _details(folder: pathlib.Path) -> tuple[dict[str, str], collections.Counter[str]]:
    """Returns an example of each reason, and the records of each licence that is not accepted."""
    examples: dict[str, str] = {}
    licences: collections.Counter[str] = collections.Counter()
    for reject in _rejects(folder):
        reason, detail = reject["reason"], reject["detail"]
        if reason not in examples and detail:
            examples[reason] = f"{reject['key']}: {detail}"
        if reason == "licence_not_allowed" and (
            detail in licences or len(licences) < _MAX_LICENCES
        ):
            licences[detail] += 1
    return examples, licences


def _rejects(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"*.{REJECTS}")):
        yield from read_lines(path)
