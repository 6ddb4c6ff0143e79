"""Reads datasets of TensorFlow Datasets, by name or by folder, without TensorFlow.

It reads the stored records (`tf.train.Example`), so encoded images are not decoded.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from leon_jax.config import UserError
from leon_jax.data.sources import field_names
from leon_jax.data.sources.field_values import (
    METADATA_NAMES,
    check_image,
    check_text,
    read_metadata,
)
from leon_jax.data.sources.files import fingerprint
from leon_jax.data.sources.random_access import IndexedSource
from leon_jax.data.sources.raw_record import RawRecord, Reject, SourceConfig

IMAGE_NAMES = ("image", "picture", "img", *field_names.ENCODED_NAMES)
TEXT_NAMES = ("caption", "captions", "captions/text", *field_names.TEXT_NAMES)
# The flat features of a record: "captions/text" holds the texts of the sequence `captions`.
Features = Any


class Tfds(IndexedSource):
    """A source of one split of a dataset.

    `path` is a folder with a `dataset_info.json`, or a name such as `coco_captions` or `covr`. A
    named dataset is downloaded and built if it does not exist, if that works without TensorFlow.
    `read_split` may use the syntax of TensorFlow Datasets, such as `train+restval` or
    `train[:1%]`. A dataset without an adapter in `_ADAPTERS` gives pairs of a caption and an image,
    one for each caption of an image.

    Raises:
      UserError: the dataset or split does not exist, or cannot be read without TensorFlow.
    """

    def __init__(self, config: SourceConfig):
        self._folder = _folder(config.path)
        super().__init__(config)

    def version(self, shard: str) -> str:
        """Returns a fingerprint of all files of the dataset."""
        return fingerprint(
            sorted(entry.path for entry in os.scandir(self._folder) if entry.is_file())
        )

    def _open(self) -> Sequence[bytes]:
        splits: list[str] = []
        try:
            builder = tfds.builder_from_directory(self._folder)
            splits = list(builder.info.splits)
            rows = builder.as_data_source(
                self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except NotImplementedError as error:
            raise UserError(
                f"the dataset in {self._folder} is not in ArrayRecord format; convert it with "
                "`tfds convert_format --out_file_format=array_record`"
            ) from error
        except Exception as error:
            existing = f"; the splits are {', '.join(splits)}" if splits else ""
            raise UserError(
                f"the split {self.split!r} of the dataset in {self._folder} cannot be read"
                f"{existing}"
            ) from error
        self._adapter: Callable[[Features, str, SourceConfig], list[RawRecord | Reject]]
        self._adapter = _ADAPTERS.get(builder.name, _pair)
        return rows

    def _read(self, index: int) -> list[RawRecord | Reject]:
        example = tf_example_pb2.Example.FromString(self._rows[index])
        return self._adapter(example.features.feature, f"{self.split}/{index}", self.config)


def _folder(path: str) -> str:
    """Returns the folder of the dataset that `path` names; a missing dataset is built first."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "dataset_info.json")):
            raise UserError(
                f"{path} has no dataset_info.json; give the folder of one version of a dataset"
            )
        return path
    try:
        # Try existing files first: they need no TensorFlow, but the code of most datasets does.
        builder = tfds.core.read_only_builder.builder_from_files(path)
    except tfds.core.DatasetNotFoundError:
        builder = _build(path)
    return os.fspath(builder.data_path)


def _build(name: str) -> tfds.core.DatasetBuilder:
    command = f"tfds build {name} --file_format=array_record"
    try:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"there is no dataset and no folder called {name}") from error
    except ImportError as error:
        raise UserError(
            f"building the dataset {name} needs {_missing_package(error)}; build it where that is "
            f"installed (`{command}`) and give its folder"
        ) from error
    except Exception as error:
        raise UserError(
            f"the dataset {name} cannot be built here; build it elsewhere (`{command}`) and give "
            "its folder"
        ) from error
    return builder


def _missing_package(error: BaseException | None) -> str:
    """Returns the package that is not installed; TensorFlow Datasets hides it in the causes."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            return f"the package {error.name}"
        error = error.__cause__ or error.__context__
    return "a package that is not installed"


def _coco_captions(features: Features, key: str, config: SourceConfig) -> list[RawRecord | Reject]:
    """Returns one record per caption of an image."""
    metadata = {"key": str(features["image/id"].int64_list.value[0])}
    image = check_image(_first_value(features, "image"), "image")
    return field_names.caption_records(
        metadata, list(features["captions/text"].bytes_list.value), image
    )


def _covr(features: Features, key: str, config: SourceConfig) -> list[RawRecord | Reject]:
    """Returns a record of a question, its images and the answer."""
    question = check_text(_first_value(features, "utterance"), "utterance")
    answer = check_text(_first_value(features, "label"), "label")
    images = [check_image(value, "images") for value in features["images"].bytes_list.value]
    # The label "None" marks a question without an answer.
    answers = () if answer == "None" else (answer,)
    return [RawRecord(key=key, parts=(question, *images, *answers))]


def _pair(features: Features, key: str, config: SourceConfig) -> list[RawRecord | Reject]:
    """Returns a record for each text of an image; the configuration may name both features."""
    names = sorted(features)
    text = field_names.choose(names, config.text, TEXT_NAMES, "text", "feature")
    image = field_names.choose(names, config.picture, IMAGE_NAMES, "image", "feature")
    values = {name: _first_value(features, name) for name in METADATA_NAMES if name in features}
    metadata = read_metadata(values, config)
    metadata["key"] = metadata["key"] or key
    data = check_image(_first_value(features, image), image)
    captions = (
        list(features[text].bytes_list.value) or list(features[text].int64_list.value) or None
    )
    return field_names.caption_records(metadata, captions, data, text)


_ADAPTERS = {"coco_captions": _coco_captions, "covr": _covr}


def _first_value(features: Features, name: str) -> Any:
    """Returns the first value of a feature, or None."""
    feature = features[name]
    values = feature.bytes_list.value or feature.int64_list.value
    return values[0] if values else None
