"""What is in a model folder, known without reading its weights, and what fits its context."""

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import pathlib

import numpy as np

from leon_jax import __version__, weight_files
from leon_jax.config import UserError, build
from leon_jax.documents import Document, Hole, Text
from leon_jax.models.decoder import DecoderConfig
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary

# Where a caption is cut unless another limit is given.
CAPTION_TOKENS = 32

FILES = ("decoder.safetensors", "tokenizer.safetensors", "text.json")
# The retrieval encoder: our own, or a folder with OpenAI's CLIP as transformers lays it out.
ENCODERS = ("encoder.safetensors", "encoder")


def encoder_path(folder: pathlib.Path) -> pathlib.Path:
    """The retrieval encoder of a model folder, for `leon_jax.retrieval.encoder.Encoder.load`.

    Raises:
      UserError: there is none.
    """
    for name in ENCODERS:
        path = folder / name
        if path.is_dir() or (path.is_file() and path.stat().st_size):
            return path
    raise UserError(
        f"the model folder {folder} has no {ENCODERS[0]} or it is empty, and no folder "
        f"{ENCODERS[1]} with a CLIP"
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder with `FILES` and one of `ENCODERS`; open one with `Checkpoint.open`.

    Attributes:
      folder: where the files are.
      config: the decoder's shape.
      documents: documents to ids, with the text tokenizer and the vocabulary.
    """

    folder: pathlib.Path
    config: DecoderConfig
    documents: DocumentTokenizer

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Checkpoint":
        """Reads the text tokenizer and the decoder's header; no weights.

        Raises:
          UserError: the folder, one of `FILES` or the encoder is missing, empty or damaged.
        """
        if not folder.is_dir():
            expected = ", ".join((*FILES, ENCODERS[0]))
            raise UserError(f"there is no model folder {folder}; it would hold {expected}")
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

    @property
    def name(self) -> str:
        """Which model this is, for people and for picture metadata."""
        return f"leon_jax {__version__} {self.folder.absolute().name}"

    @functools.cached_property
    def digest(self) -> str:
        """Tells the weights of one decoder from those of another: 12 hexadecimal digits.

        Of the file's size and of 64 pieces of it, for a large model is read for minutes. Training
        changes every weight; a file that was changed in few places only may have the same.
        """
        path = self.folder / "decoder.safetensors"
        found, size = hashlib.sha256(), path.stat().st_size
        found.update(str(size).encode())
        with path.open("rb") as file:
            for piece in range(64):
                file.seek(size * piece // 64)
                found.update(file.read(4096))
        return found.hexdigest()[:12]

    @property
    def context(self) -> int:
        """How many positions the decoder has."""
        return self.config.max_length

    def check_prompt(self, prompt: str, num_docs: int) -> None:
        """Checks a prompt for a picture, and how many documents are to be read with it.

        Raises:
          UserError: the prompt is empty or too long, or so many documents cannot fit.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty; say what the picture should show")
        try:
            document = Document((Text(prompt), Hole("image")))
        except ValueError as error:
            raise UserError(f"the prompt cannot be read: {error}") from error
        used = self._extent(self.documents.encode(document)) + self.documents.image_tokens
        if used > self.context:
            tokens = len(self.documents.text.encode(prompt))
            raise UserError(
                f"the prompt has {len(prompt)} characters or {tokens} tokens; with the picture "
                f"there is room for {tokens + self.context - used} tokens, so make it shorter"
            )
        self._check_documents(used, num_docs)

    def check_caption(self, max_tokens: int, num_docs: int) -> None:
        """Checks the length limit of a caption, and how many documents are to be read with it.

        Raises:
          UserError: a number is out of range.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; a caption has at least 1 token")
        vocabulary = self.documents.vocabulary
        picture = [vocabulary.image_start] * self.documents.image_tokens
        before = [vocabulary.eos, vocabulary.sentinel(0), vocabulary.break_id, *picture]
        used = self._extent(np.array([*before, vocabulary.eos, vocabulary.sentinel(0)]))
        used += max_tokens
        if used > self.context:
            raise UserError(
                f"max_tokens is {max_tokens}; beside a picture there is room for "
                f"{max_tokens + self.context - used}"
            )
        self._check_documents(used, num_docs)

    def check_num_docs(self, num_docs: int) -> None:
        """Checks how many documents are to be read with any prompt for a picture.

        Raises:
          UserError: the number is negative, or so many fit beside no prompt.
        """
        vocabulary = self.documents.vocabulary
        shortest = np.array([vocabulary.eos, vocabulary.text_start, vocabulary.break_id])
        self._check_documents(self._extent(shortest) + self.documents.image_tokens, num_docs)

    def _check_documents(self, used: int, num_docs: int) -> None:
        if num_docs < 0:
            raise UserError(f"num_docs is {num_docs}; it must be 0 or more")
        # A retrieved document is at least a one-token text, a picture and a <break> after each.
        step = self.config.part_step
        least = sum(-(-part // step) * step for part in (2, self.documents.image_tokens + 1))
        fit = (self.context - used) // least
        if num_docs > fit:
            raise UserError(
                f"num_docs is {num_docs}; the model's context of {self.context} positions holds "
                f"at most {fit} documents beside this request; ask for fewer, or shorten it"
            )

    def fitting(
        self, retrieved: list[Document], query: Document, answer_tokens: int
    ) -> list[Document]:
        """The retrieved documents that fit beside the query, in the order they are read.

        The least relevant, the last ones, are left out first. The most relevant is read last, next
        to the query.
        """
        kept = list(retrieved)
        while kept:
            # A query that is not open is followed by one sentinel.
            used = self._extent(self.documents.encode([*kept[::-1], query])) + 1
            if used + answer_tokens <= self.context:
                break
            kept.pop()
        return kept[::-1]

    def _extent(self, ids: np.ndarray) -> int:
        return self.documents.vocabulary.extent(ids, self.config.part_step)


def model_folder(checkpoint: str | os.PathLike | None) -> pathlib.Path:
    """The model folder that is meant; None is the model that comes with the package."""
    if checkpoint is not None:
        return pathlib.Path(checkpoint)
    return pathlib.Path(str(importlib.resources.files("leon_jax"))) / "weights" / "emoji"
