"""The stages of a pipeline: each is one `leon` command with a config file, and can be run alone."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leon_jax.config import UserError
from leon_jax.data.document_folder import MANIFEST, TRAIN, DocumentFolder
from leon_jax.tokenizers.text import TextTokenizer

# The kinds of training, in the order of their dependencies.
_KINDS = ("text", "tokenizer", "encoder", "decoder")
_KEYS = {
    "kind", "size", "prepare", "index", "thresholds", "encode", "selection", "stages", "seconds",
}  # fmt: skip
_INDEX_KEYS = {"prepare", "share"}
# Fewer documents cannot train an encoder or measure thresholds.
MIN_DOCUMENTS = 8


@dataclasses.dataclass(frozen=True)
class Command:
    """A `leon` command.

    Attributes:
      arguments: the command line after `leon`; empty: nothing runs.
      config: values of the config file that the arguments name, written before the command runs;
        None: it has no config file.
      notes: what was adapted to the data, one sentence each.
      files: texts of files to write, by path.
    """

    arguments: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """A digest of the arguments, the config and the files."""
        values = [self.arguments, self.config, dict(self.files)]
        content = json.dumps(values, sort_keys=True, default=list)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
      name: name of the stage, and of its folder in the workdir.
      title: what it does, for the terminal.
      make: returns the command. It is called when the stages before it are finished, because the
        command depends on their results.
      output: a file that exists once the stage is finished.
      seconds: estimated duration on the reference machine.
      is_repeated: whether the command runs every time, because it notices changed inputs itself.
    """

    name: str
    title: str
    make: Callable[[], Command]
    output: pathlib.Path
    seconds: float
    is_repeated: bool = False


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a pipeline.

    Attributes:
      sources: sources of `leon prepare`, `[SPLIT=]KIND:PATH`.
      prepare_flags: further flags of `leon prepare`, for example "--licence=CC-BY-4.0".
      workdir: the folder of the pipeline.
    """

    sources: Sequence[str]
    prepare_flags: Sequence[str]
    workdir: pathlib.Path


class Layout:
    """The paths of a pipeline's files.

    Args:
      workdir: the folder of the pipeline.
    """

    def __init__(self, workdir: pathlib.Path):
        self.workdir = workdir
        self.documents = workdir / "documents"
        self.index = workdir / "index"
        self.text = workdir / "text" / "export" / "text.json"
        self.tokenizer = workdir / "tokenizer" / "export" / "tokenizer.safetensors"
        self.encoder = workdir / "encoder" / "export" / "encoder.safetensors"
        self.selection = self.encoder.with_name("selection.json")
        self.model = workdir / "model"

    def config(self, stage: str) -> pathlib.Path:
        """Returns the path of a stage's config file."""
        return self.workdir / "configs" / f"{stage}.py"

    def decoder(self, stage: str) -> pathlib.Path:
        """Returns the path of the decoder that a stage trains."""
        return self.workdir / stage / "export" / "decoder.safetensors"


def stages(values: Mapping[str, Any], inputs: Inputs) -> list[Stage]:
    """Returns the stages that train all models and write a model folder.

    Args:
      values: the configuration, for example of configs/own.py.
      inputs: the data and the workdir.

    Raises:
      UserError: a key is unknown or missing.
    """
    if unknown := set(values) - _KEYS:
        keys = ", ".join(sorted(_KEYS))
        raise UserError(f"config.{min(unknown)} is unknown; the keys are {keys}")
    if not inputs.sources and not values.get("prepare", {}).get("sources"):
        raise UserError("--data is missing; for example --data=my_cats")
    for kind in _KINDS:
        if kind not in {config.get("kind") for config in values["stages"].values()}:
            raise UserError(f"config.stages has no stage of the kind {kind}")
    files = Layout(inputs.workdir)
    seconds = values.get("seconds", {})
    result = [_documents(values, inputs, files)]
    index = values.get("index")
    if index is not None:
        result.append(_index_documents(index, inputs, files))
    decoders: list[str] = []
    before_decoder = True
    for name, config in sorted(values["stages"].items(), key=_position):
        if config["kind"] == "decoder":
            if before_decoder:
                title = "encode the documents and find neighbours"
                result.append(_thresholds(values, files))
                result.append(_encode("encode", title, files.documents, values, files))
                if index is not None:
                    title = "encode the documents of the index"
                    result.append(_encode("encode_index", title, files.index, values, files))
                before_decoder = False
            data = {"variants": values.get("encode", {}).get("variants", 1), **config["data"]}
            if index is not None:
                data |= _mixture(index, files)
            config = {**config, "data": data}
            result.append(
                _decoder(name, config, files, decoders[-1] if decoders else None, seconds)
            )
            decoders.append(name)
        else:
            result.append(_training(name, config, files, seconds))
    used_index = files.documents if index is None else files.index
    result.append(_export(decoders[-1], files, used_index))
    return result


def _position(item: tuple[str, Mapping[str, Any]]) -> tuple[int, str]:
    """Returns the position of a stage: by kind, and several decoders by name."""
    name, config = item
    kind = config.get("kind", "")
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS)), name


def _documents(values: Mapping[str, Any], inputs: Inputs, files: Layout) -> Stage:
    settings = values.get("prepare", {})

    def make() -> Command:
        return prepare_command("documents", inputs, files, settings, files.documents)

    return Stage("documents", "collect the documents", make, files.documents / MANIFEST, 60, True)


def _index_documents(index: Mapping[str, Any], inputs: Inputs, files: Layout) -> Stage:
    """Returns the stage that collects the documents of the model's index.

    Raises:
      UserError: a key is unknown or missing, or the share is out of range.
    """
    if set(index) != _INDEX_KEYS:
        raise UserError(
            f"config.index has the keys {', '.join(sorted(index))}; it must have "
            f"{' and '.join(sorted(_INDEX_KEYS))}"
        )
    if not 0 <= index["share"] <= 1:
        raise UserError(f"config.index.share is {index['share']}; it must be 0 to 1")
    # The configuration names its sources with their licences.
    accepts = [flag for flag in inputs.prepare_flags if flag.startswith("--accept=")]
    index_inputs = Inputs((), accepts, inputs.workdir)

    def make() -> Command:
        return prepare_command("index", index_inputs, files, index["prepare"], files.index)

    return Stage(
        "index", "collect the documents of the index", make, files.index / MANIFEST, 60, True
    )


def _mixture(index: Mapping[str, Any], files: Layout) -> dict[str, Any]:
    """Returns the training data of a decoder: all documents, and those of the index alone."""
    shares = {files.documents: 1 - index["share"], files.index: index["share"]}
    return {
        "mixture": [
            {"folder": str(folder), "weight": share} for folder, share in shares.items() if share
        ]
    }


def _training(
    name: str, config: Mapping[str, Any], files: Layout, seconds: Mapping[str, float]
) -> Stage:
    """Returns the stage that trains the text tokenizer, the image tokenizer or the encoder."""
    kind = config["kind"]
    titles = {
        "text": "train the text tokenizer",
        "tokenizer": "train the image tokenizer",
        "encoder": "train the retrieval encoder",
    }
    if kind not in titles:
        raise UserError(f"config.stages.{name}.kind is {kind!r}; it is not known")
    output = {"text": files.text, "tokenizer": files.tokenizer, "encoder": files.encoder}[kind]
    if name != kind:
        raise UserError(f"config.stages.{name} is of the kind {kind}; it must be called {kind}")

    def make() -> Command:
        adapted, notes = adapt_batch(name, config, DocumentFolder(files.documents))
        data = {**adapted.get("data", {}), "folder": str(files.documents)}
        if kind == "encoder":
            data["text"] = str(files.text)
        return train_command(name, {**adapted, "data": data}, files, notes)

    return Stage(name, titles[kind], make, output, seconds.get(name, 5))


def adapt_batch(
    name: str,
    config: Mapping[str, Any],
    documents: DocumentFolder,
    least: int = MIN_DOCUMENTS,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the configuration of a stage, with a batch that the documents can fill.

    Raises:
      UserError: there are too few documents to train on.
    """
    count = documents.splits[TRAIN]
    if count < least:
        raise UserError(
            f"{documents.folder} has {count} documents to train on; at least {least} are needed"
        )
    if config["kind"] == "text":
        return dict(config), ()
    available = count
    if config["kind"] == "encoder":
        # A batch of the encoder has every group once.
        lines = documents.listing(TRAIN)
        available = len({line.get("group") or line.get("picture") for line in lines})
    batch_size = config["batch_size"]
    # Every batch of an epoch is full, so a batch of half the documents wastes few of them.
    largest = max(2, 1 << max(available // 2, 1).bit_length() - 1)
    if batch_size <= available:
        return dict(config), ()
    return {**config, "batch_size": largest}, (
        f"{name}: batch_size is {largest} instead of {batch_size}, because there are {available} "
        "different training examples",
    )


def _thresholds(values: Mapping[str, Any], files: Layout) -> Stage:
    """Returns the stage that measures selection rules, or writes those of the configuration."""
    selection, flags = values.get("selection"), values.get("thresholds", {})

    def make() -> Command:
        if selection is not None:
            return Command((), files={str(files.selection): json.dumps(dict(selection)) + "\n"})
        return Command(
            (
                "thresholds",
                f"--folder={files.documents}",
                f"--encoder={files.encoder}",
                *(f"--{name}={value}" for name, value in flags.items()),
            )
        )

    return Stage("thresholds", "measure the encoder's thresholds", make, files.selection, 15)


def _encode(
    name: str, title: str, folder: pathlib.Path, values: Mapping[str, Any], files: Layout
) -> Stage:
    """Returns the stage that encodes a documents folder with the models of the pipeline."""

    def make() -> Command:
        models = {"tokenizer": files.tokenizer, "encoder": files.encoder, "text": files.text}
        return encode_command(folder, models, values.get("encode", {}))

    return Stage(name, title, make, folder / "encoded", 60, True)


def _decoder(
    name: str,
    config: Mapping[str, Any],
    files: Layout,
    previous: str | None,
    seconds: Mapping[str, float],
) -> Stage:
    """Returns the stage that trains the decoder, from the weights of `previous` if it is set."""

    def make() -> Command:
        adapted, notes = adapt_batch(name, config, DocumentFolder(files.documents))
        text_tokens = TextTokenizer.load(files.text).size
        layout = dict(adapted.get("vocabulary", {}))
        layout.setdefault("sentinels", 16)
        layout["image_codes"] = _codes(files.tokenizer)
        least = 4 + layout["image_codes"] + 2 + layout["sentinels"]
        layout["text_start"] = max(layout.get("text_start", 0), least)
        layout["text_tokens"] = text_tokens
        model = {**adapted["model"], "vocab_size": layout["text_start"] + text_tokens}
        data = {**adapted["data"], "text": str(files.text)}
        if not data.get("mixture"):
            data["folder"] = str(files.documents)
        samples = {"captions": sample_captions(files.documents), **adapted.get("samples", {})}
        samples |= {"image": str(files.tokenizer)}
        loop = dict(adapted.get("loop", {}))
        values = {
            **adapted, "vocabulary": layout, "model": model, "data": data, "samples": samples,
            "loop": loop,
        }  # fmt: skip
        if previous is not None:
            loop["init_from"] = str(files.decoder(previous))
        else:
            values["codebook"] = str(files.tokenizer)
        return train_command(name, values, files, notes)

    return Stage(name, "train the decoder", make, files.decoder(name), seconds.get(name, 60))


def _codes(tokenizer: pathlib.Path) -> int:
    """Returns the number of codes of an image tokenizer."""
    from leon_jax import weight_files

    return weight_files.read_config(tokenizer, "tokenizer")["codes"]


def sample_captions(folder: pathlib.Path, count: int = 4) -> tuple[str, ...]:
    """Returns captions of held-out documents, or else of train, for the sample images."""
    documents = DocumentFolder(folder)
    held_out = [split for split, size in documents.splits.items() if split != TRAIN and size]
    records = documents.records(held_out[0] if held_out else TRAIN)
    step = max(1, len(records) // count)
    return tuple(records[row].text for row in range(0, len(records), step)[:count])


def _export(decoder: str, files: Layout, index: pathlib.Path) -> Stage:
    def make() -> Command:
        return Command(
            (
                "export", f"--workdir={files.workdir / decoder}", f"--tokenizer={files.tokenizer}",
                f"--encoder={files.encoder}", f"--text={files.text}",
                f"--selection={files.selection}", f"--index={index}",
                f"--out={files.model}",
            )
        )  # fmt: skip

    return Stage("model", "write the model folder", make, files.model / "model.json", 5)


def prepare_command(
    name: str,
    inputs: Inputs,
    files: Layout,
    settings: Mapping[str, Any],
    out: pathlib.Path,
) -> Command:
    """Returns the command that collects documents into the folder `out`."""
    sources = [f"--source={source}" for source in inputs.sources]
    return Command(
        (
            "prepare",
            f"--config={files.config(name)}",
            *sources,
            *inputs.prepare_flags,
            # Later stages may have been made from the documents that are there.
            "--noreplace",
            f"--out={out}",
        ),
        settings,
    )


def encode_command(
    folder: pathlib.Path, models: Mapping[str, pathlib.Path], flags: Mapping[str, Any]
) -> Command:
    """Returns the command that encodes a documents folder.

    Args:
      folder: the documents folder.
      models: paths of "tokenizer", "encoder" and "text".
      flags: further flags of `leon encode`, for example {"variants": 16}.
    """
    return Command(
        (
            "encode",
            f"--folder={folder}",
            *(f"--{kind}={path}" for kind, path in models.items()),
            *(f"--{name}={value}" for name, value in flags.items()),
        )
    )


def train_command(
    name: str, values: Mapping[str, Any], files: Layout, notes: tuple[str, ...]
) -> Command:
    return Command(
        ("train", f"--config={files.config(name)}", f"--workdir={files.workdir / name}"),
        values,
        notes,
    )
