"""TensorFlow Datasets: reads datasets that its COCO and COVR builders made from small files."""

import importlib.resources
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.object_detection import coco, coco_captions

from leon_jax.config import UserError
from leon_jax.data.records import from_png
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import RawRecord, SourceConfig
from tests.data.hostile_images import encoded, pixels

# A builder needs a package that tensorflow-datasets does not install; Python includes it.
BACKPORT = {"importlib_resources": importlib.resources}
ONE_FILE = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)


def read(path, **config):
    source = open_source(SourceConfig("tfds", str(path), **config))
    return [outcome for shard in source.shards() for outcome in source.read(shard)]


def build(builder, downloaded) -> str:
    """Builds the dataset from local files in place of downloads; returns its folder."""
    with (
        mock.patch.object(tfds.download.DownloadManager, "download_and_extract", downloaded),
        mock.patch.dict(sys.modules, BACKPORT),
    ):
        builder.download_and_prepare(download_config=ONE_FILE)
    return str(builder.data_path)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """The folder of a `coco_captions` with five images, and the images: id -> (captions, JPEG)."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "train2014").mkdir()
    content, images, sentences = {}, [], []
    for n in range(5):
        name = f"COCO_train2014_{n:012}.jpg"
        texts = tuple(f"Café {n}, caption {m}." for m in range(n))
        content[n + 100] = (texts, encoded(pixels(rng), "jpeg"))
        (root / "train2014" / name).write_bytes(content[n + 100][1])
        images.append({"id": n + 100, "file_name": name, "height": 64, "width": 64})
        raws = [{"raw": text, "sentid": 10 * n + m} for m, text in enumerate(texts)]
        sentences.append({"split": "train", "filename": name, "sentences": raws})
    (root / "val2014").symlink_to("train2014")
    sentences += [{**sentences[-1], "split": split} for split in ("val", "test", "restval")]
    categories = [{"id": n, "name": f"thing {n}"} for n in range(80)]
    annotations = {"categories": categories, "images": images, "annotations": []}
    for split in ("train2014", "val2014"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))
    (root / "annotations" / "image_info_test2014.json").write_text(json.dumps(annotations))
    (root / "dataset_coco.json").write_text(json.dumps({"images": sentences}))

    def downloaded(manager, urls):
        return {name: str(root) for name in urls}

    # The builder uses types of TensorFlow; those of NumPy have the same names and work as well.
    gfile = types.SimpleNamespace(GFile=open, exists=lambda path: pathlib.Path(path).exists())
    stand_in = types.SimpleNamespace(int64=np.int64, io=types.SimpleNamespace(gfile=gfile))
    with mock.patch.object(coco, "tf", stand_in):
        builder = coco_captions.CocoCaptions(
            data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record"
        )
        return build(builder, downloaded), content


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The folder of a `covr` with four questions, and the expected parts of its records."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("covr")
    jpegs = {str(n): encoded(pixels(rng), "jpeg") for n in range(4)}
    (root / "VG").mkdir()
    for name, data in jpegs.items():
        (root / "VG" / f"{name}.jpg").write_bytes(data)
    items, expected = [], set()
    for n in range(4):
        answer = (True, "two", None, 3)[n]
        scenes = [str(m) for m in range(n, 4)]
        item = {
            "qid": str(n), "utterance": f"Sind es {n} Bücher?", "scenes": scenes, "properties": [],
            "pattern_name": "", "program": [],
        }  # fmt: skip
        items.append(item if answer is None else item | {"answer": answer})
        end = () if answer is None else (str(answer),)
        expected.add((item["utterance"], *(jpegs[scene] for scene in scenes), *end))
    for split in ("train", "test", "val"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))

    def downloaded(manager, urls):
        import etils.epath

        return {name: etils.epath.Path(root) for name in urls}

    builder = tfds.builder_cls("covr")(
        data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record"
    )
    return build(builder, downloaded), expected


class TestCocoCaptions:
    def test_each_pair_of_image_and_caption_is_a_record(self, captions):
        folder, images = captions
        outcomes = {outcome.key: outcome for outcome in read(folder, name="coco")}
        expected = {
            f"{image}#{n}": RawRecord(f"{image}#{n}", (text, jpeg), group=str(image))
            for image, (texts, jpeg) in images.items()
            if len(texts) > 1
            for n, text in enumerate(texts, start=1)
        }
        # The image with one caption keeps its key.
        expected["101"] = RawRecord("101", (images[101][0][0], images[101][1]))
        rejects = [outcome for key, outcome in outcomes.items() if key not in expected]
        assert [reject.reason for reject in rejects] == ["no_text"]
        assert {key: outcomes[key] for key in expected} == expected
        assert len(outcomes) == 4 + 3 + 2 + 1 + 1

    def test_the_order_is_the_same_in_every_read_and_with_any_shards(self, captions):
        folder, _ = captions
        assert read(folder) == read(folder, shard_size=2) == read(folder, shard_size=1)

    def test_splits_use_the_syntax_of_tfds(self, captions):
        folder, _ = captions
        whole = read(folder)
        parts = read(folder, read_split="train[:40%]") + read(folder, read_split="train[40%:]")
        keys = [outcome.key for outcome in parts if isinstance(outcome, RawRecord)]
        assert keys == [outcome.key for outcome in whole if isinstance(outcome, RawRecord)]

    def test_a_pickled_source_reads_the_same_records(self, captions):
        source = open_source(SourceConfig("tfds", captions[0], shard_size=2))
        again = pickle.loads(pickle.dumps(source))
        assert again.shards() == source.shards() == ["train/0", "train/2", "train/4"]
        assert list(again.read("train/2")) == list(source.read("train/2"))
        assert again.version("train/2") == source.version("train/2")

    def test_a_name_refers_to_a_dataset_that_was_built_before(self, captions, monkeypatch):
        """A new process reads its files without TensorFlow, which the code of the dataset needs."""
        program = (
            "import sys; from leon_jax.data.sources.open import open_source;"
            "from leon_jax.data.sources.raw_record import SourceConfig;"
            "source = open_source(SourceConfig('tfds', 'coco_captions'));"
            "print(sum(1 for shard in source.shards() for _ in source.read(shard)));"
            "assert not {'tensorflow', 'torch', 'cv2'} & set(sys.modules)"
        )
        root = pathlib.Path(captions[0]).parents[2]
        monkeypatch.setenv("TFDS_DATA_DIR", str(root))
        process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (process.returncode, process.stdout) == (0, "11\n"), process.stderr


def test_covr_records_are_question_images_and_answer(questions):
    folder, expected = questions
    outcomes = read(folder, split="test")
    assert {outcome.parts for outcome in outcomes} == expected
    assert [outcome.key for outcome in outcomes] == [f"test/{n}" for n in range(4)]


class MyCats(tfds.core.GeneratorBasedBuilder):
    """A dataset without an adapter."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        texts = dict.fromkeys(("caption", "title", "license", "url"), tfds.features.Text())
        images = dict.fromkeys(("image", "thumbnail"), tfds.features.Image(encoding_format="png"))
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({**texts, **images}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("a cat"), "test": self._generate_examples("")}

    def _generate_examples(self, caption):
        rng = np.random.default_rng(0)
        for n in range(3):
            yield n, {
                "caption": caption, "title": f"Katze {n}", "license": "CC0-1.0",
                "url": "https://example.org",
                "image": encoded(pixels(rng), "png"),
                "thumbnail": encoded(pixels(rng, 8, 8), "png"),
            }  # fmt: skip


class TestOtherDatasets:
    @pytest.fixture
    def folder(self, tmp_path):
        return build(MyCats(data_dir=tmp_path / "tfds", file_format="array_record"), None)

    def test_the_default_features_are_read(self, folder):
        rng = np.random.default_rng(0)
        for n, raw in enumerate(read(folder)):
            assert (raw.key, raw.parts[0]) == (f"train/{n}", "a cat")
            assert np.array_equal(from_png(raw.parts[1]), pixels(rng))
            pixels(rng, 8, 8)
            assert (raw.licence, raw.attribution) == ("CC0-1.0", "https://example.org")

    def test_the_configuration_names_other_features(self, folder):
        raws = read(folder, text="title", picture="thumbnail")
        assert [raw.parts[0] for raw in raws] == ["Katze 0", "Katze 1", "Katze 2"]
        assert {from_png(raw.parts[1]).shape for raw in raws} == {(8, 8, 3)}
        reasons = [outcome.reason for outcome in read(folder, text="titel")]
        assert reasons == ["missing_field"] * 3

    def test_an_empty_text_is_not_missing(self, folder):
        assert [raw.parts[0] for raw in read(folder, read_split="test")] == [""] * 3

    def test_damaged_records_are_rejected(self, folder, tmp_path):
        copy = pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))
        [file] = copy.glob("*train*")
        data = file.read_bytes()
        position = data.index(b"Katze 1")
        file.write_bytes(data[:position] + b"Katzen!" + data[position + 7 :])
        outcomes = read(copy)
        assert [isinstance(outcome, RawRecord) for outcome in outcomes] == [True, False, True]
        assert outcomes[1].reason == "unreadable_record"


class TestErrors:
    def test_a_folder_without_a_dataset_raises_an_error(self, tmp_path):
        with pytest.raises(UserError, match=r"has no dataset_info.json; give the folder of one"):
            read(tmp_path)

    def test_a_missing_split_raises_an_error(self, captions):
        with pytest.raises(
            UserError, match=r"split 'valid' of .* cannot be read; the splits are \w+(, \w+)*$"
        ):
            read(captions[0], split="valid")

    def test_a_format_without_random_access_raises_an_error(self, captions, tmp_path):
        copy = pathlib.Path(shutil.copytree(captions[0], tmp_path / "copy"))
        info = copy / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(UserError, match=r"not in ArrayRecord format; convert it with"):
            read(copy)

    def test_an_unknown_name_raises_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        with pytest.raises(UserError, match="there is no dataset and no folder called my_catz"):
            read("my_catz")

    def test_a_dataset_that_needs_tensorflow_raises_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        with pytest.raises(
            UserError,
            match=r"needs the package tensorflow; .*tfds build coco_captions --file_format",
        ):
            read("coco_captions")
