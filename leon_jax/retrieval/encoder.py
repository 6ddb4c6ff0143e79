"""The frozen encoder: texts, pictures and whole documents to unit vectors."""

import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from leon_jax import model_files, sharding
from leon_jax.config import UserError, build
from leon_jax.data.augment import plain
from leon_jax.documents import Document, Image, Text
from leon_jax.models.clip import CLIP, CLIPConfig, TextConfig, create
from leon_jax.tokenizers.text import TextTokenizer

KIND = "encoder"
# Ids that the encoder adds after the text tokenizer's own: padding, start, end (the last one).
SPECIALS = 3


def frame(ids: Sequence[int], config: TextConfig) -> Int32[np.ndarray, "t"]:
    """Start, the ids, end, then padding up to the context length; what is too long is cut."""
    framed = np.full(config.context_length, config.vocab_size - SPECIALS, np.int32)
    ids = list(ids)[: config.context_length - 2]
    framed[0] = config.start
    framed[1 : len(ids) + 1] = ids
    framed[len(ids) + 1] = config.end
    return framed


class Encoder:
    """A CLIP with its text tokenizer, on a fixed batch size; call it under `jax.set_mesh`.

    Every method takes host values and returns float32[n, d] with rows of length 1.
    """

    def __init__(self, model: CLIP, text: TextTokenizer, batch_size: int = 64):
        self.model, self.text, self.batch_size = model, text, batch_size
        self._image = jax.jit(lambda model, images: model.embed_image(images))
        self._text = jax.jit(lambda model, ids: model.embed_text(ids))

    @classmethod
    def load(
        cls, path: str | os.PathLike, text_tokenizer: TextTokenizer, batch_size: int = 64
    ) -> "Encoder":
        """Reads `encoder.safetensors`.

        Raises:
          UserError: the file is missing, damaged, of another kind, or made for another tokenizer.
        """
        arrays, values = model_files.load(path, KIND)
        config = build(CLIPConfig, values)
        if config.text.vocab_size != text_tokenizer.size + SPECIALS:
            raise UserError(
                f"{os.fspath(path)} was trained with a text tokenizer of "
                f"{config.text.vocab_size - SPECIALS} entries, not {text_tokenizer.size}"
            )
        abstract = jax.eval_shape(lambda: create(config, jax.random.key(0)))
        return cls(
            model_files.restore(abstract, arrays, os.fspath(path)), text_tokenizer, batch_size
        )

    @property
    def dimensions(self) -> int:
        """Length of an embedding."""
        return self.model.config.embed_dim

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Embeds each text; what exceeds the context length is cut off."""
        config = self.model.config.text
        ids = [frame(self.text.encode(text), config) for text in texts]
        return self._run(self._text, ids)

    def embed_images(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]]
    ) -> Float32[np.ndarray, "n d"]:
        """Embeds sRGB pictures of any size; each is resized to the encoder's square.

        Raises:
          UserError: a picture is not uint8[h, w, 3].
        """
        size = self.model.config.vision.image_size
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise UserError(
                    f"a picture must be uint8[h, w, 3], not {image.dtype}{list(image.shape)}"
                )
        return self._run(self._image, (plain(image, size) for image in images))

    def embed_documents(self, documents: Sequence[Document]) -> Float32[np.ndarray, "n d"]:
        """Embeds documents: the mean of the unit vectors of all texts and pictures, renormalised.

        CM3Leon (section 2.1) averages the normalised text and image embeddings of a pair. The mean
        is brought back to length 1 so that an inner product of two documents is a cosine.

        Raises:
          UserError: a document has neither text nor a picture with pixels.
        """
        texts: list[tuple[int, str]] = []
        images: list[tuple[int, np.ndarray]] = []
        for number, document in enumerate(documents):
            before = len(texts) + len(images)
            for part in document.parts:
                if isinstance(part, Text):
                    texts.append((number, part.text))
                elif isinstance(part, Image) and part.pixels is not None:
                    images.append((number, part.pixels))
            if len(texts) + len(images) == before:
                raise UserError(
                    f"document {number} has neither text nor pixels, so it has no embedding"
                )
        total = np.zeros((len(documents), self.dimensions), np.float32)
        np.add.at(total, [n for n, _ in texts], self.embed_texts([text for _, text in texts]))
        np.add.at(total, [n for n, _ in images], self.embed_images([image for _, image in images]))
        return normalise(total)

    def embed_document(self, document: Document) -> Float32[np.ndarray, "d"]:
        """`embed_documents` of one: the renormalised mean of its parts' unit vectors."""
        return self.embed_documents([document])[0]

    def _run(self, function, rows) -> Float32[np.ndarray, "n d"]:
        results = [np.zeros((0, self.dimensions), np.float32)]
        for batch in _batches(rows, self.batch_size):
            # One shape, one compilation: a short last batch repeats its first row.
            filled = batch + [batch[0]] * (self.batch_size - len(batch))
            results.append(sharding.fetch(function(self.model, np.stack(filled)))[: len(batch)])
        return np.concatenate(results)


def normalise(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows scaled to length 1; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _batches(rows, size: int) -> Iterator[list[np.ndarray]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
