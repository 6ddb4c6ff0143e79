"""The splits of all designs: those of two designs stay, and the new ones follow their rules."""

import collections
import hashlib
import os

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.datasets.emoji import design_splits, npm_designs, similar_images, splits
from leon_jax.datasets.emoji.captions import names
from leon_jax.datasets.emoji.designs import OPENMOJI, TWEMOJI
from leon_jax.datasets.emoji.npm_designs import ALL_DESIGNS, FLUENT, FLUENT_3D, NOTO, NPM_DESIGNS
from leon_jax.datasets.emoji.similar_images import NearCopy, near_copies, signature
from tests.datasets import npm_packages

# The splits of OpenMoji and Twemoji: documents, and the start of the SHA-256 of their keys and
# languages.
RECORDED = {
    "train": (7488, "eb457336682733b8"),
    "unseen_design": (200, "27ae91a2e74c3009"),
    "unseen_concept": (200, "8dd8176fd47c1591"),
}


def keys(members):
    return [f"{member.design.name}/{member.concept}" for member in members]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Packages in which every design has every concept; nothing is drawn."""
    icons = dict.fromkeys(map(str.lower, names()), "")
    folder = npm_packages.write(tmp_path_factory.mktemp("npm"), noto=icons, fluent=icons)
    assets = npm_designs.package_folder(folder, FLUENT_3D.package) / "assets"
    for points in icons:
        (assets / f"{points}.webp").touch()
    return folder


@pytest.fixture(scope="module")
def members(folder):
    return design_splits.members(folder)


@pytest.fixture(scope="module")
def signatures():
    """Random images of all concepts in all designs, which are all different."""
    rng = np.random.default_rng(0)
    return {
        f"{design.name}/{concept}": rng.uniform(0, 1, 40).astype(np.float32)
        for design in ALL_DESIGNS
        for concept in names()
    }


@pytest.fixture(scope="module")
def chosen(signatures):
    return design_splits.choose(signatures)


class TestMembers:
    def test_the_splits_of_openmoji_and_twemoji_stay(self, members):
        for split, (count, digest) in RECORDED.items():
            old = [m for m in members[split] if m.design in (OPENMOJI, TWEMOJI)]
            text = "\n".join(f"{m.design.name}/{m.concept} {m.language}" for m in old)
            assert (len(old), hashlib.sha256(text.encode()).hexdigest()[:16]) == (count, digest)
            for member in old:
                assert member.name == names()[member.concept][member.language]
            if split != "train":
                assert members[split][:count] == old

    def test_each_image_is_in_one_split_at_most(self, members):
        all_keys = [key for split in members.values() for key in keys(split)]
        assert len(set(all_keys)) == len(all_keys)
        assert not set(all_keys) & set(design_splits.load().left_out)

    def test_held_out_concepts_are_in_no_design_of_train(self, members):
        family = splits.load_splits().family
        held_out = {family(member.concept) for member in members["unseen_concept"]}
        assert not held_out & {family(member.concept) for member in members["train"]}
        assert {m.design for m in members["unseen_concept"]} == set(ALL_DESIGNS)

    def test_a_held_out_design_is_in_train_in_other_designs_only(self, members):
        family = splits.load_splits().family
        train = collections.defaultdict(set)
        for member in members["train"]:
            train[family(member.concept)].add(member.design)
        for member in members["unseen_design"]:
            others = train[family(member.concept)]
            assert member.design not in others and OPENMOJI in others
            if member.design in (FLUENT, FLUENT_3D):  # they are nearly alike
                assert not {FLUENT, FLUENT_3D} & others

    def test_train_has_everything_else(self, members):
        in_splits = {key for split in members.values() for key in keys(split)}
        missing = {f"{d.name}/{c}" for d in ALL_DESIGNS for c in names()} - in_splits
        left_out = set(design_splits.load().left_out)
        # Families that this package adds to held-out ones, and images that were left out.
        rest = {key.partition("/")[2] for key in missing - left_out}
        family = splits.load_splits().family
        held_out = {family(c) for listed in design_splits.load().unseen_design.values()
                    for c in listed}  # fmt: skip
        assert {family(concept) for concept in rest} <= held_out

    def test_held_out_captions_are_the_english_name(self, members):
        for split in ("unseen_design", "unseen_concept"):
            for member in members[split]:
                assert member.language == "en" and member.name == names()[member.concept]["en"]

    def test_the_first_fifty_concepts_of_a_design_belong_to_fifty_families(self):
        family = splits.load_splits().family
        for concepts in design_splits.load().unseen_design.values():
            assert len({family(concept) for concept in concepts[:50]}) == 50

    def test_other_versions_of_the_packages_are_refused(self, tmp_path):
        folder = npm_packages.write(tmp_path)
        package = npm_designs.package_folder(folder, "emojibase-data") / "package.json"
        npm_packages.write_json(package, {"version": "16.0.0"})
        with pytest.raises(UserError, match=r"emojibase-data 16\.0\.0, but the splits are those"):
            design_splits.members(folder)


class TestChoose:
    def test_every_design_holds_out_about_two_hundred_images(self, chosen):
        assert chosen.near_copies == () and chosen.left_out == ()
        recorded = splits.load_splits()
        for design in NPM_DESIGNS:
            concepts = chosen.unseen_design[design.name]
            assert 180 < len(concepts) == len(set(concepts)) <= 200
            families = {recorded.family(concept) for concept in concepts}
            assert not families & {recorded.family(c) for c in recorded.unseen_concept}
            members = {c for c in names() if recorded.family(c) in families}
            assert members == set(concepts)
        assert chosen.unseen_design["fluent"] == chosen.unseen_design["fluent3d"]
        assert set(chosen.unseen_design["noto"]) != set(chosen.unseen_design["fluent"])

    def test_a_held_out_image_that_train_nearly_has_is_left_out(self, signatures, chosen):
        concept = chosen.unseen_design["noto"][0]
        copy = signatures[f"openmoji/{concept}"] + np.float32(0.01)
        changed = design_splits.choose(signatures | {f"noto/{concept}": copy})
        assert changed.left_out == (f"noto/{concept}",)
        assert changed.unseen_design["noto"] == chosen.unseen_design["noto"][1:]
        (copies,) = changed.near_copies
        assert (copies.held_out, copies.train) == (f"noto/{concept}", f"openmoji/{concept}")

    def test_a_recorded_held_out_image_stays_and_its_copy_leaves_train(self, signatures, chosen):
        recorded = splits.load_splits()
        concept = next(c for c in recorded.unseen_design if c not in chosen.unseen_design["noto"])
        copy = {f"noto/{concept}": signatures[f"twemoji/{concept}"]}
        changed = design_splits.choose(signatures | copy)
        assert changed.left_out == (f"noto/{concept}",)
        assert changed.near_copies == (NearCopy(f"twemoji/{concept}", f"noto/{concept}", 0.0),)

    def test_copies_among_recorded_images_are_listed_only(self, signatures):
        concept = splits.load_splits().unseen_design[0]
        copy = {f"openmoji/{concept}": signatures[f"twemoji/{concept}"]}
        changed = design_splits.choose(signatures | copy)
        assert changed.left_out == () and len(changed.near_copies) == 1

    def test_blank_images_are_left_out(self, signatures):
        blank = {"fluent3d/1F431": np.zeros(40, np.float32)}
        assert design_splits.choose(signatures | blank).left_out == ("fluent3d/1F431",)

    def test_the_record_can_be_read_back(self, chosen, monkeypatch, tmp_path):
        written = design_splits.DesignSplits(
            chosen.unseen_design, ("noto/2B1B",), (NearCopy("noto/2B1B", "twemoji/2B1B", 0.125),)
        )
        path = tmp_path / "splits.json"
        path.write_text(design_splits.to_json(written))
        monkeypatch.setattr(design_splits, "SPLITS_FILE", path)
        assert design_splits.load.__wrapped__() == written
        assert '["noto/2B1B", "twemoji/2B1B", 0.125]' in path.read_text()


class TestNearCopies:
    def gray(self, value):
        return signature(np.full((64, 64, 3), value, np.uint8))

    def test_the_distance_is_relative_to_the_stronger_image(self):
        images = {"noto/1": self.gray(55), "openmoji/1": self.gray(95), "twemoji/1": self.gray(115)}
        copies = near_copies(images, ["noto/1"], ["openmoji/1", "twemoji/1"])
        assert copies == [NearCopy("noto/1", "openmoji/1", 0.2)]  # 40 of 200; 60 of 200 is too much

    def test_different_concepts_must_be_almost_equal(self):
        images = {"noto/1": self.gray(55), "noto/2": self.gray(63), "noto/3": self.gray(67)}
        copies = near_copies(images, ["noto/1"], ["noto/2", "noto/3"])
        assert copies == [NearCopy("noto/1", "noto/2", 0.04)]

    def test_many_images_are_compared_in_blocks(self):
        rng = np.random.default_rng(0)
        rows = rng.uniform(0, 1, (700, 12)).astype(np.float32)
        images = {f"a/{i}": row for i, row in enumerate(rows)}
        images |= {f"b/{i}": row for i, row in enumerate(rows)}
        copies = near_copies(
            images, [f"a/{i}" for i in range(700)], [f"b/{i}" for i in reversed(range(700))]
        )
        same = [(f"a/{i}", f"b/{i}") for i in range(700)]
        assert [(f.held_out, f.train) for f in copies if f.held_out[2:] == f.train[2:]] == same
        for copy in copies:
            first, second = images[copy.held_out], images[copy.train]
            norm = max(np.linalg.norm(first), np.linalg.norm(second))
            assert copy.distance == pytest.approx(np.linalg.norm(first - second) / norm, abs=6e-4)

    def test_nothing_is_near_nothing(self):
        assert near_copies({"noto/1": self.gray(0)}, ["noto/1"], []) == []

    def test_two_designs_of_a_concept_are_not_near_copies(self):
        from leon_jax.datasets.emoji.designs import render

        images = {
            f"{design.name}/{concept}": signature(render(design, concept, 64))
            for design in (OPENMOJI, TWEMOJI)
            for concept in ("1F431", "2764", "1F3E0", "1F697")
        }
        held_out = [key for key in images if key.startswith("twemoji")]
        train = [key for key in images if key.startswith("openmoji")]
        assert near_copies(images, held_out, train) == []
        assert similar_images.SAME_CONCEPT > similar_images.OTHER_CONCEPT


@pytest.mark.slow
@pytest.mark.skipif("LEON_TEST_NPM" not in os.environ, reason="needs LEON_TEST_NPM")
class TestRealPackages:
    """LEON_TEST_NPM names the folder that `npm_designs.install_command` installed into."""

    def test_the_committed_splits_are_those_that_the_code_computes(self):
        computed = design_splits.compute(os.environ["LEON_TEST_NPM"])
        assert design_splits.SPLITS_FILE.read_text() == design_splits.to_json(computed)

    def test_no_held_out_image_is_nearly_a_train_image_of_any_design(self):
        """Some pairs of OpenMoji and Twemoji are; their splits are older than this comparison."""
        folder = os.environ["LEON_TEST_NPM"]
        members = design_splits.members(folder)
        signatures = {
            key: signature(npm_designs.render(folder, member.design, member.concept, 64))
            for split in members.values()
            for key, member in zip(keys(split), split, strict=True)
        }
        held_out = keys(members["unseen_design"] + members["unseen_concept"])
        copies = near_copies(signatures, held_out, keys(members["train"]))
        recorded = {OPENMOJI.name, TWEMOJI.name}
        for copy in copies:
            assert {copy.held_out.split("/")[0], copy.train.split("/")[0]} <= recorded
        assert set(copies) <= set(design_splits.load().near_copies)
        assert len(copies) == 14

    def test_the_designs_have_so_many_concepts(self):
        folder = os.environ["LEON_TEST_NPM"]
        counts = {d.name: len(npm_designs.concepts(folder, d) & set(names())) for d in NPM_DESIGNS}
        assert counts == {NOTO.name: 3682, FLUENT.name: 3139, FLUENT_3D.name: 3372}
