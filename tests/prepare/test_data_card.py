"""The data card: its counts match the documents, and it escapes all markup."""

import dataclasses
import html.parser
import re

import pytest

from leon_jax.data.sources.raw_record import REASONS
from leon_jax.prepare import data_card
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.config import DuplicatesConfig
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny

HOSTILE = "<script>alert(1)</script> | **bold**\nnext"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    documents = tiny.documents()
    for row, changes in ((0, {"attribution": HOSTILE}), (1, {"source": HOSTILE}),
                         (2, {"licence": "GPL-3.0-only"}), (3, {"licence": "none at all"}),
                         (4, {"language": "de"})):  # fmt: skip
        provenance = dataclasses.replace(documents[row].provenance, **changes)
        documents[row] = dataclasses.replace(documents[row], provenance=provenance)
    config, sources = tiny.preparation(
        tiny.folders()[0],
        {"train": documents, "exam": tiny.held_out()},
        duplicates=DuplicatesConfig(near=0.995, evaluation=0.999),
    )
    folder = tmp_path_factory.mktemp("card") / "prepared"
    preparing.prepare(config, folder, sources=sources, progress=False)
    return folder


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def tables(markdown):
    """{split: {heading: {label: count}}} of the card's Markdown."""
    counts, split, heading = {}, None, None
    for line in markdown.splitlines():
        if line.startswith("## "):
            split = line[3:]
        elif line.startswith("### "):
            heading = line[4:]
        elif (row := re.fullmatch(r"\| (.*) \| ([\d,]+) \|", line)) is not None:
            counts.setdefault(split, {}).setdefault(heading, {})[row[1]] = int(row[2])
    return counts


def test_the_counts_match_the_documents(folder):
    text = (folder / "card.md").read_text()
    counts, listed = tables(text), list(PreparedFolder(folder).listing())
    assert sum(counts["train"]["Languages"].values()) == len(listed)
    assert counts["train"]["Languages"]["de"] == 1
    rejected = counts["train"]["Rejected records"]
    assert rejected["licence_not_allowed: a licence that is not accepted"] == 1
    assert rejected["licence_unknown: no licence, or not an SPDX expression"] == 1
    assert sum(rejected.values()) + len(listed) == len(tiny.documents())
    assert "above 0.995" in text and "above 0.999" in text and "CC-BY-4.0" in text


def test_both_cards_have_the_same_counts_and_escape_markup(folder):
    page = Page((folder / "card.html").read_text())
    text = " ".join(page.text)
    for split in tables((folder / "card.md").read_text()).values():
        for table in split.values():
            for label, count in table.items():
                assert label.replace("\\|", "|").split(" | ")[0] in " ".join(text.split())
                assert f"{count:,}" in text
    assert "script" not in {tag for tag, _ in page.tags} and "<script>" in text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(
        data_card.samples(PreparedFolder(folder))
    )
    bars = [a["style"] for tag, a in page.tags if tag == "div"]
    assert bars and all(0 < float(re.search(r"width:([\d.]+)%", b)[1]) <= 100 for b in bars)


def test_the_card_explains_every_reject_reason():
    assert set(data_card.MEANINGS) == set(REASONS)
