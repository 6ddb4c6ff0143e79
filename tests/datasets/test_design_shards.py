"""All designs of the emoji as a source: records, and the documents folder made from them."""

import pathlib
import pickle
import runpy

import numpy as np
import pytest

from leon_jax import config as configs
from leon_jax.config import UserError
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.data.records import from_png
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.datasets import demo  # noqa: F401  # registers the source kinds
from leon_jax.datasets.emoji import design_splits
from leon_jax.datasets.emoji.captions import names
from leon_jax.datasets.emoji.designs import TWEMOJI
from leon_jax.datasets.emoji.npm_designs import ALL_DESIGNS, NPM_DESIGNS, install_command
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.config import PrepareConfig
from tests.datasets import npm_packages

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONCEPTS = ("1F3E0", "1F431", "2764")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Packages with three concepts; of the splits only those members remain."""
    icons = {c.lower(): '<circle cx="16" cy="16" r="12" fill="#f80"/>' for c in CONCEPTS}
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[64:192, 64:192] = (0, 80, 255, 255)
    images = dict.fromkeys(icons, pixels)
    folder = npm_packages.write(tmp_path / "npm", icons, icons, images)
    every = design_splits.members

    def few(folder):
        splits = every(folder)
        train = [member for member in splits["train"] if member.concept in CONCEPTS]
        return {split: members[:2] for split, members in splits.items()} | {"train": train}

    monkeypatch.setattr(design_splits, "members", few)
    return folder


def test_every_member_is_a_record(folder):
    config = SourceConfig("emoji_designs", folder, split="train", shard_size=8)
    source = pickle.loads(pickle.dumps(open_source(config)))
    assert source.shards() == ["train/0", "train/8"]
    raws = [raw for shard in source.shards() for raw in source.read(shard)]
    by_key = {raw.key: raw for raw in raws}
    assert set(by_key) == {f"{d.name}/{c}" for d in ALL_DESIGNS for c in CONCEPTS}
    for design in ALL_DESIGNS:
        for concept in CONCEPTS:
            raw = by_key[f"{design.name}/{concept}"]
            caption, png = raw.parts
            name, style = caption.rsplit(", ", 1)
            assert style == design.style
            assert from_png(png).shape == (256, 256, 3)
            assert (raw.licence, raw.attribution) == (design.licence, design.attribution)
            assert (raw.origin, raw.group, raw.family) == (design.package, concept, concept)
            assert name in raw.captions and caption in raw.captions
            if raw.language != "en":
                assert name == names()[concept][raw.language]
    assert by_key["openmoji/1F431"].parts[0] == "cat face, OpenMoji style"


def test_an_unknown_split_raises_an_error(folder):
    with pytest.raises(UserError, match="'test'; the splits are train, unseen_design"):
        open_source(SourceConfig("emoji_designs", folder, split="test"))


def test_a_folder_without_packages_raises_an_error_with_the_command(tmp_path):
    with pytest.raises(UserError, match=r"package\.json is missing; .* npm install --prefix"):
        open_source(SourceConfig("emoji_designs", str(tmp_path)))


def test_a_documents_folder_credits_every_design(folder, tmp_path):
    sources = tuple(
        SourceConfig("emoji_designs", folder, split=split) for split in ("train", "unseen_design")
    )
    config = PrepareConfig(sources=sources, picture_side=64)
    preparing.prepare(config, tmp_path / "out", progress=False)
    documents = DocumentFolder(tmp_path / "out")
    assert documents.splits == {"train": 15, "unseen_design": 2}
    assert {d.provenance.group for d in documents.records("train")} == set(CONCEPTS)
    assert documents.records("train")[0].pixels.shape == (64, 64, 3)
    card = (tmp_path / "out" / "card.md").read_text()
    for design in ALL_DESIGNS:
        assert design.attribution in card and design.package in card
    held_out = documents.records("unseen_design")[0].provenance
    assert held_out.source == TWEMOJI.package


def test_the_pages_and_the_config_have_the_command_that_installs_the_packages():
    command = install_command("data/npm").split()
    for path in ("docs/data_format.md", "configs/emoji/designs.py"):
        words = (ROOT / path).read_text().replace("\\\n", " ").split()
        start = words.index("npm")
        assert words[start : start + len(command)] == command, path


def test_the_notice_names_every_design():
    notice = (ROOT / "NOTICE").read_text()
    for design in NPM_DESIGNS:
        assert design.attribution.partition("(")[2].partition(")")[0] in notice


def test_the_example_config_prepares_all_splits():
    values = runpy.run_path(str(ROOT / "configs/emoji/designs.py"))["get_config"]().to_dict()
    config = configs.build(PrepareConfig, values)
    assert config.splits == ("train", "unseen_design", "unseen_concept")
    assert config.picture_side == 64 and not config.duplicates.exact
