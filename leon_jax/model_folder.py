"""A model folder and its files.

Training, conversion and tuning write a model folder. Generation and evaluation load one. Opening a
folder does not read the weights.
"""

import dataclasses
import functools
import importlib.resources
import os
import pathlib
import shutil

import jax
from flax import nnx

from leon_jax import __version__, weight_digests, weight_files
from leon_jax.config import UserError, build
from leon_jax.models.decoder import Decoder, DecoderConfig
from leon_jax.models.weight_conversion import WeightType, convert_weights, unstack
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary

FILES = ("decoder.safetensors", "tokenizer.safetensors", "text.json")
# The retrieval encoder: a file of leon_jax, or a folder with OpenAI's CLIP as transformers writes.
ENCODERS = ("encoder.safetensors", "encoder")


def encoder_path(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of a model folder's encoder, for `RetrievalEncoder.load`.

    Raises:
      UserError: the folder has no encoder.
    """
    for name in ENCODERS:
        path = folder / name
        if path.is_dir() or (path.is_file() and path.stat().st_size):
            return path
    raise UserError(
        f"the model folder {folder} has no {ENCODERS[0]} or it is empty, and it has no folder "
        f"{ENCODERS[1]} with a CLIP"
    )


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A folder with `FILES` and one of `ENCODERS`. Open it with `ModelFolder.open`.

    Attributes:
      path: the folder.
      config: configuration of the decoder.
      tokenizer: the document tokenizer, with the text tokenizer and the vocabulary.
    """

    path: pathlib.Path
    config: DecoderConfig
    tokenizer: DocumentTokenizer

    @classmethod
    def open(cls, folder: str | os.PathLike | None = None) -> "ModelFolder":
        """Reads the text tokenizer and the header of the decoder, but no weights.

        Args:
          folder: the model folder; None: the model that the package includes.

        Raises:
          UserError: the folder, one of `FILES` or the encoder is missing, empty or damaged.
        """
        folder = shipped_folder() if folder is None else pathlib.Path(folder)
        if not folder.is_dir():
            expected = ", ".join((*FILES, ENCODERS[0]))
            raise UserError(f"there is no model folder {folder}; a model folder has {expected}")
        for name in FILES:
            if not (folder / name).is_file() or not (folder / name).stat().st_size:
                raise UserError(f"the model folder {folder} has no {name}, or it is empty")
        encoder_path(folder)
        path = folder / "decoder.safetensors"
        header = weight_files.read_config(path, "decoder")
        try:
            config = build(DecoderConfig, header["model"], "model")
            vocabulary = build(Vocabulary, header["vocabulary"], "vocabulary")
            rows, columns = header["image_shape"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the header of {path} is not a decoder's: {error}") from error
        text = TextTokenizer.load(folder / "text.json")
        return cls(folder, config, DocumentTokenizer(vocabulary, text, (rows, columns)))

    def load_decoder(self, weights: WeightType = "float32") -> Decoder:
        """Reads the decoder for inference, with unstacked layers. Needs a mesh to be set.

        Args:
          weights: type of the weights.

        Raises:
          UserError: the file is damaged or has another configuration.
        """
        path = self.path / "decoder.safetensors"
        arrays, _ = weight_files.load(path, "decoder")
        abstract = jax.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
        decoder = weight_files.restore(abstract, arrays, str(path))
        if weights != "float32":
            decoder = jax.jit(lambda model: convert_weights(model, weights))(decoder)
        return unstack(decoder)

    def copy_to(self, folder: str | os.PathLike) -> None:
        """Copies each file atomically to another folder. The same folder does not change."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(self.path):
            return
        for name in (*FILES, "selection.json", encoder_path(self.path).name):
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
        return f"leon_jax {__version__} {self.path.absolute().name}"

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


def shipped_folder() -> pathlib.Path:
    """Returns the folder of the model that the package includes."""
    return pathlib.Path(str(importlib.resources.files("leon_jax"))) / "weights" / "emoji"
