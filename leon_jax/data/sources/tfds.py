"""Data sets of TensorFlow Datasets, by name or by folder, read without TensorFlow.

What is read are the stored records (`tf.train.Example`), so pictures stay the bytes they are.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from leon_jax.config import UserError
from leon_jax.data.sources.field_values import CLAIM_NAMES, Fault, check_picture, check_text, claims
from leon_jax.data.sources.files import version
from leon_jax.data.sources.random_access import Numbered, captions
from leon_jax.data.sources.raw_record import Raw, Reject, SourceConfig

PICTURES = ("image", "picture")
TEXTS = ("caption", "text")
# The features of one record, flat: "captions/text" are the texts of the sequence `captions`.
Features = Any


class Tfds(Numbered):
    """A source of one split of a data set.

    `path` is the folder that holds `dataset_info.json`, or a name such as `coco_captions` or
    `covr`; what has that name and is not there yet is downloaded, where that works without
    TensorFlow. `read_split` may be anything that TensorFlow Datasets understands, such as
    `train+restval` or `train[:1%]`. Data sets without an adapter in `_ADAPTERS` give the pair of
    one text and one picture.

    Raises:
      UserError: there is no such data set or split, or it cannot be read without TensorFlow.
    """

    def __init__(self, config: SourceConfig):
        self._folder = _folder(config.path)
        super().__init__(config)

    def version(self, shard: str) -> str:
        """Of all files of the data set."""
        return version(sorted(entry.path for entry in os.scandir(self._folder) if entry.is_file()))

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
                f"the data set in {self._folder} is not in ArrayRecord format; convert it with "
                "`tfds convert_format --out_file_format=array_record`"
            ) from error
        except Exception as error:
            there = f"; it has {', '.join(splits)}" if splits else ""
            raise UserError(
                f"the split {self.split!r} of the data set in {self._folder} cannot be read{there}"
            ) from error
        self._adapter: Callable[[Features, str, SourceConfig], list[Raw | Reject]]
        self._adapter = _ADAPTERS.get(builder.name, _pair)
        return rows

    def _read(self, index: int) -> list[Raw | Reject]:
        example = tf_example_pb2.Example.FromString(self._rows[index])
        return self._adapter(example.features.feature, f"{self.split}/{index}", self.config)


def _folder(path: str) -> str:
    """The folder of the data set that `path` names; it is downloaded and made if need be."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "dataset_info.json")):
            raise UserError(
                f"{path} has no dataset_info.json; give the folder of one version of a data set"
            )
        return path
    try:
        # Files first: the code of most data sets needs TensorFlow, files do not.
        builder = tfds.core.read_only_builder.builder_from_files(path)
    except tfds.core.DatasetNotFoundError:
        builder = _make(path)
    return os.fspath(builder.data_path)


def _make(name: str) -> tfds.core.DatasetBuilder:
    command = f"tfds build {name} --file_format=array_record"
    try:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"there is no data set and no folder called {name}") from error
    except ImportError as error:
        raise UserError(
            f"making the data set {name} needs {_missing(error)}; make it where that is "
            f"installed (`{command}`) and give its folder"
        ) from error
    except Exception as error:
        raise UserError(
            f"the data set {name} cannot be made here; make it elsewhere (`{command}`) and give "
            "its folder"
        ) from error
    return builder


def _missing(error: BaseException | None) -> str:
    """The package that an import did not find; TensorFlow Datasets raises errors without names."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            return f"the package {error.name}"
        error = error.__cause__ or error.__context__
    return "a package that is not installed"


def _coco_captions(features: Features, key: str, config: SourceConfig) -> list[Raw | Reject]:
    """A record for each pair of picture and caption, as training from text to picture sees them."""
    said = {"key": str(features["image/id"].int64_list.value[0])}
    picture = check_picture(_one(features, "image"), "image")
    return captions(said, features["captions/text"].bytes_list.value, picture)


def _covr(features: Features, key: str, config: SourceConfig) -> list[Raw | Reject]:
    """Question, pictures, answer."""
    question = check_text(_one(features, "utterance"), "utterance")
    answer = check_text(_one(features, "label"), "label")
    pictures = [check_picture(value, "images") for value in features["images"].bytes_list.value]
    # A question without an answer has this label.
    answers = () if answer == "None" else (answer,)
    return [Raw(key=key, parts=(question, *pictures, *answers))]


def _pair(features: Features, key: str, config: SourceConfig) -> list[Raw | Reject]:
    """The text and the picture that the configuration names, or those that are usually there."""
    text = _first(features, config.text, TEXTS)
    picture = _first(features, config.picture, PICTURES)
    said = claims({name: _one(features, name) for name in CLAIM_NAMES if name in features}, config)
    return [
        Raw(
            **{**said, "key": said["key"] or key},
            parts=(
                check_text(_one(features, text), text),
                check_picture(_one(features, picture), picture),
            ),
        )
    ]


_ADAPTERS = {"coco_captions": _coco_captions, "covr": _covr}


def _first(features: Features, chosen: str, usual: tuple[str, ...]) -> str:
    for name in (chosen,) if chosen else usual:
        if name in features:
            return name
    raise Fault("missing_field", f"no feature is called {chosen or ' or '.join(usual)}")


def _one(features: Features, name: str) -> Any:
    """The first value of a feature, or None."""
    feature = features[name]
    values = feature.bytes_list.value or feature.int64_list.value
    return values[0] if values else None
