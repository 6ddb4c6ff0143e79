"""A model folder and its files.

`leon export` and the end of a decoder's training run write a model folder (`leon_jax.export`).
Generation and evaluation load one. Opening a folder does not read the weights.
"""

import dataclasses
import functools
import importlib.resources
import os
import pathlib
import shutil

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from leon_jax import (
    __version__,
    model_archive,
    model_description,
    storage,
    weight_digests,
    weight_files,
)
from leon_jax.config import UserError, build
from leon_jax.model_description import GenerationDefaults, IndexAddress, ModelDescription
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.models.weight_conversion import WeightType, convert_weights, unstack
from leon_jax.tokenizers.class_names import load_text
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.template import PromptTemplate, TemplateTokenizer
from leon_jax.vocabulary import Vocabulary

FILES = ("decoder.safetensors", "tokenizer.safetensors", "text.json")
# The retrieval encoder: a file of leon_jax, or a folder with OpenAI's CLIP as transformers writes.
ENCODERS = ("encoder.safetensors", "encoder")
SELECTION = "selection.json"
CARD = "README.md"
# The record of a conversion from published weights.
CONVERSION = "conversion.json"
# A prepared folder inside the model folder; `model.json` then names it as the index.
INDEX = "index"


def encoder_path(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of a model folder's encoder, for `RetrievalEncoder.load`.

    Raises:
      UserError: the folder has no encoder.
    """
    for name in ENCODERS:
        path = folder / name
        if path.is_dir() or _has_content(path):
            return path
    raise UserError(f"the model folder {folder} has no {_ENCODER_NAMES}, or it is empty")


# How messages call the encoder.
_ENCODER_NAMES = f"{ENCODERS[0]} (or folder {ENCODERS[1]} with a CLIP)"


def has_encoder(folder: pathlib.Path) -> bool:
    """Returns whether a folder has a retrieval encoder."""
    return any((folder / name).is_dir() or _has_content(folder / name) for name in ENCODERS)


def missing_files(folder: pathlib.Path) -> list[str]:
    """Returns the names of the necessary files that a folder lacks or that are empty."""
    missing = [name for name in FILES if not _has_content(folder / name)]
    if not has_encoder(folder) and _needs_encoder(folder):
        missing.append(_ENCODER_NAMES)
    return missing


def _needs_encoder(folder: pathlib.Path) -> bool:
    """Returns whether the decoder reads retrieved documents: with a prompt template it does not."""
    try:
        return "template" not in weight_files.read_config(folder / FILES[0], "decoder")
    except UserError:  # the caller opens the file again, and reports it
        return True


def _has_content(path: pathlib.Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A folder with `FILES` and one of `ENCODERS`. Open it with `ModelFolder.open`.

    Attributes:
      path: the folder.
      config: configuration of the decoder.
      tokenizer: the document tokenizer, with the text tokenizer and the vocabulary.
      description: the content of `model.json`; None: the folder has none.
    """

    path: pathlib.Path
    config: DecoderConfig
    tokenizer: DocumentTokenizer
    description: ModelDescription | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike | None = None) -> "ModelFolder":
        """Reads `model.json`, the text tokenizer and the header of the decoder, but no weights.

        Args:
          folder: the model folder, or a `.tar` of one, which is unpacked once into the cache
            folder; None: the shipped model.

        Raises:
          UserError: the folder does not exist; files of it are missing or empty (the message lists
            all of them), or damaged.
        """
        folder = shipped_folder() if folder is None else _on_disk(folder)
        if folder.is_file():
            folder = model_archive.unpack(folder)
        if not folder.is_dir():
            expected = ", ".join((*FILES, ENCODERS[0]))
            raise UserError(f"there is no model folder {folder}; a model folder has {expected}")
        if missing := missing_files(folder):
            is_run = (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
            hint = f"run leon export --workdir={folder} --out=FOLDER" if is_run else (
                "leon export writes a complete folder"
            )  # fmt: skip
            raise UserError(
                f"the model folder {folder} has no {', '.join(missing)}, or they are empty; {hint}"
            )
        path = folder / "decoder.safetensors"
        header = weight_files.read_config(path, "decoder")
        try:
            config = build(DecoderConfig, header["model"], "model")
            vocabulary = build(Vocabulary, header["vocabulary"], "vocabulary")
            rows, columns = header["image_shape"]
            layout = header.get("template")
            template = None if layout is None else build(PromptTemplate, layout, "template")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the header of {path} is not a decoder's: {error}") from error
        text = load_text(folder / "text.json")
        if template is None:
            tokenizer = DocumentTokenizer(vocabulary, text, (rows, columns))
        else:
            tokenizer = TemplateTokenizer(vocabulary, text, (rows, columns), template)
        return cls(folder, config, tokenizer, model_description.read(folder))

    def load_decoder(self, weights: WeightType = "float32") -> Decoder:
        """Reads the decoder for inference, with unstacked layers. Needs a mesh to be set.

        Args:
          weights: type of the weights.

        Raises:
          UserError: the file is damaged or has another configuration.
        """
        path = self.path / "decoder.safetensors"
        # Mapped, so that the file and the decoder are not both in memory.
        _, arrays = weight_files.read_mapped(path, "decoder")
        abstract = jax.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
        decoder = weight_files.restore(abstract, arrays, str(path))
        if weights != "float32":
            decoder = jax.jit(lambda model: convert_weights(model, weights))(decoder)
        return unstack(decoder)

    def copy_to(self, folder: str | os.PathLike) -> None:
        """Copies each file atomically to another folder. The same folder does not change.

        In a bucket `decoder.safetensors` is copied last.
        """
        folder = storage.path(folder)
        if storage.is_bucket(folder):
            storage.upload(self.path, folder, FILES[0], is_complete_folder=False)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(self.path):
            return
        optional = (SELECTION, CARD, INDEX, CONVERSION, model_description.FILE)
        for name in (*FILES, *ENCODERS, *optional):
            source, temporary = self.path / name, folder / f"{name}.tmp"
            if source.is_file():
                shutil.copyfile(source, temporary)
                os.replace(temporary, folder / name)
            elif source.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(source, temporary)
                shutil.rmtree(folder / name, ignore_errors=True)
                os.replace(temporary, folder / name)

    @property
    def name(self) -> str:
        """Name and version of the model, for messages and for the metadata of images."""
        return f"leon_jax {__version__} {storage.absolute(self.path).name}"

    @functools.cached_property
    def digest(self) -> str:
        """12 digits that identify the decoder's weights; see `sampled_digest`."""
        return weight_digests.sampled_digest(self.path / "decoder.safetensors")

    @functools.cached_property
    def former_digests(self) -> list[str]:
        """The digests of the same weights in earlier versions of this project."""
        return weight_digests.former_sampled_digests(self.path / "decoder.safetensors")

    @property
    def context(self) -> int:
        """The number of positions of the decoder."""
        return self.config.max_length

    @property
    def index(self) -> IndexAddress:
        """Where the model's documents are; an empty address without `model.json`."""
        return IndexAddress() if self.description is None else self.description.index

    @property
    def index_path(self) -> pathlib.Path:
        """The path of the prepared folder that `index` names. It may not exist."""
        return storage.join(self.path, self.index.folder)

    @functools.cached_property
    def defaults(self) -> GenerationDefaults:
        """The generation defaults; without `model.json` guidance 3 and the 2 documents that fit."""
        if self.description is not None:
            return self.description.defaults()
        defaults = GenerationDefaults()
        return dataclasses.replace(defaults, num_docs=min(defaults.num_docs, self.max_docs))

    @property
    def max_docs(self) -> int:
        """The number of retrieved documents that fit beside the shortest request for an image."""
        vocabulary = self.tokenizer.vocabulary
        shortest = np.array([vocabulary.eos, vocabulary.text_start, vocabulary.break_id])
        return max(0, self.docs_beside(self.extent(shortest) + self.tokenizer.image_tokens))

    def docs_beside(self, used: int) -> int:
        """Returns the number of the shortest documents that fit; negative if `used` is too much.

        The shortest document is a text of one token and an image, each with a <break>.

        Args:
          used: positions of the request and of its result.
        """
        step = self.config.part_step
        shortest = sum(-(-part // step) * step for part in (2, self.tokenizer.image_tokens + 1))
        return (self.context - used) // shortest

    def extent(self, ids: Int[np.ndarray, "n"]) -> int:
        """Returns the number of positions of a sequence of ids."""
        return self.tokenizer.vocabulary.extent(ids, self.config.part_step)


def _on_disk(folder: str | os.PathLike) -> pathlib.Path:
    """Returns a path, of a copy if it is in a bucket; a folder without a decoder is not copied."""
    path = storage.path(folder)
    is_model = path.name.endswith(".tar") or (path / FILES[0]).is_file()
    if storage.is_bucket(path) and not is_model:
        raise UserError(f"there is no model folder {path}: it has no {FILES[0]}")
    return storage.local(path)


def shipped_folder() -> pathlib.Path:
    """Returns the model folder of the shipped model."""
    return pathlib.Path(str(importlib.resources.files("leon_jax"))) / "weights" / "emoji"
