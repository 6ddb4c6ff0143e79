"""The summary of rejected records: numbers, reasons, and the flags that would accept them."""

import json

from leon_jax.data.sources.raw_record import REASONS
from leon_jax.prepare import data_card, reject_summary


def folder_of(tmp_path, *rejects):
    lines = [dict(zip(("key", "reason", "detail"), reject, strict=True)) for reject in rejects]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "train-00000.rejects.jsonl").write_text(text)
    counts = {reason: sum(line["reason"] == reason for line in lines) for _, reason, _ in rejects}
    return tmp_path, {"splits": {"train": 9}, "counts": {"train": {"rejected": counts}}}


def test_nothing_is_said_if_nothing_was_rejected(tmp_path):
    assert reject_summary.lines(*folder_of(tmp_path)) == []


def test_reasons_come_with_numbers_remedies_and_examples(tmp_path):
    forbidden = "its licence is CC-BY-NC-4.0, which --accept=CC-BY-NC-4.0 would accept"
    other = "its licence is GPL-3.0-only, which --accept=GPL-3.0-only would accept"
    folder, manifest = folder_of(
        tmp_path, ("a", "licence_not_allowed", forbidden), ("b", "licence_not_allowed", other),
        ("c", "picture_too_small", "7 x 9 pixels"), ("d", "licence_not_allowed", forbidden),
    )  # fmt: skip
    assert reject_summary.lines(folder, manifest) == [
        "4 of 13 records were rejected:",
        "  3 licence_not_allowed: a licence that is not accepted",
        f"    2: {forbidden}",
        f"    1: {other}",
        "  1 picture_too_small: an image with too few pixels",
        "    to accept them: a smaller min_side in a --config",
        "    for example c: 7 x 9 pixels",
        f"All of them: {folder}/*.rejects.jsonl",
    ]


def test_only_the_most_frequent_licences_are_listed(tmp_path):
    rejects = [(str(n), "licence_not_allowed", f"licence {n % 8}") for n in range(20)]
    lines = reject_summary.lines(*folder_of(tmp_path, *rejects))
    assert lines[2] == "    3: licence 0" and lines[7] == "    and 3 other licences"


def test_every_reason_has_a_meaning_and_every_remedy_is_for_a_reason():
    assert set(data_card.MEANINGS) == set(REASONS) >= set(reject_summary._REMEDIES)
