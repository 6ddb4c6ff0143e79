"""The frozen retrieval encoder: texts, images and whole documents to unit vectors."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32, UInt8

from leon_jax import sharding, storage, weight_files
from leon_jax.config import UserError, build
from leon_jax.data.augment import plain
from leon_jax.documents import Document, Image, Text
from leon_jax.models.clip import CLIP, CLIPConfig, TextConfig, create
from leon_jax.retrieval import openai_clip_folder
from leon_jax.tokenizers.clip_text import CLIPTextTokenizer
from leon_jax.tokenizers.text import TextTokenizer

KIND = "encoder"
# Special ids after the text tokenizer's ids: padding, start, end (the last one).
SPECIALS = 3


def frame(ids: Sequence[int], config: TextConfig) -> Int32[np.ndarray, "t"]:
    """Adds start, end and padding up to the context length; ids that do not fit are cut off."""
    framed = np.full(config.context_length, config.vocab_size - SPECIALS, np.int32)
    ids = list(ids)[: config.context_length - 2]
    framed[0] = config.start
    framed[1 : len(ids) + 1] = ids
    framed[len(ids) + 1] = config.end
    return framed


class RetrievalEncoder:
    """A CLIP with its text tokenizer and a fixed batch size. Call it under `jax.set_mesh`.

    Texts and images are host values. Embeddings are float32[n, d], with rows of length 1.

    Args:
      model: both towers.
      text: the text tokenizer; `frame` adds start, end and padding to its ids.
      preprocess: converts an image of any size to uint8[size, size, 3], as in the model's training.
      batch_size: texts or images that are embedded at once.
    """

    def __init__(
        self,
        model: CLIP,
        text: TextTokenizer | CLIPTextTokenizer,
        preprocess: Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "size size 3"]],
        batch_size: int = 64,
    ):
        self.model, self.text, self.batch_size = model, text, batch_size
        self._preprocess = preprocess
        self._embed_image = jax.jit(lambda model, squares: model.embed_image(squares / 255))
        self._embed_text = jax.jit(lambda model, ids: model.embed_text(ids))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        text_tokenizer: TextTokenizer | None = None,
        batch_size: int = 64,
    ) -> "RetrievalEncoder":
        """Reads an encoder that leon_jax trained, or OpenAI's CLIP.

        The near-copy thresholds of `SelectionConfig`, 0.9, fit CLIP ViT-B/32. An encoder that
        leon_jax trained needs other thresholds (docs/retrieval.md).

        Args:
          path: `encoder.safetensors`, or a CLIP folder in the format of transformers, which
            includes its text tokenizer (see `leon_jax.retrieval.openai_clip_folder`).
          text_tokenizer: the tokenizer that `encoder.safetensors` was trained with; None: reads
            `text.json` beside it.
          batch_size: texts or images that are embedded at once.

        Raises:
          UserError: a file is missing, damaged, of another kind, or made for another tokenizer.
        """
        path = storage.path(path)
        if path.is_dir():
            return cls(*openai_clip_folder.load(storage.local(path)), batch_size)
        arrays, values = weight_files.load(path, KIND)
        text = text_tokenizer or TextTokenizer.load(path.with_name("text.json"))
        config = build(CLIPConfig, values)
        if config.text.vocab_size != text.size + SPECIALS:
            raise UserError(
                f"{path} was trained with a text tokenizer of "
                f"{config.text.vocab_size - SPECIALS} entries, not {text.size}"
            )
        abstract = jax.eval_shape(lambda: create(config, jax.random.key(0)))
        model = weight_files.restore(abstract, arrays, str(path))
        preprocess = functools.partial(plain_square, size=config.vision.image_size)
        return cls(model, text, preprocess, batch_size)

    @property
    def dimensions(self) -> int:
        """Length of an embedding."""
        return self.model.config.embed_dim

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Embeds each text. Tokens beyond the context length are cut off."""
        config = self.model.config.text
        ids = [frame(self.text.encode(text), config) for text in texts]
        return self._run(self._embed_text, ids)

    def preprocess(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """Converts an image of any size to the square that `embed_preprocessed` takes.

        It needs no mesh, so that the process that reads images can make them small.

        Raises:
          UserError: the image is not uint8[h, w, 3], or has no pixels.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
            raise UserError(
                f"an image must be uint8[h, w, 3], not {pixels.dtype}{list(pixels.shape)}"
            )
        return self._preprocess(pixels)

    def embed_preprocessed(
        self, squares: Iterable[UInt8[np.ndarray, "size size 3"]]
    ) -> Float32[np.ndarray, "n d"]:
        """Embeds images that `preprocess` returned. It takes one batch at a time from `squares`.

        Raises:
          UserError: an image is not uint8[size, size, 3].
        """
        size = self.model.config.vision.image_size

        def checked() -> Iterator[np.ndarray]:
            for square in squares:
                if square.dtype != np.uint8 or square.shape != (size, size, 3):
                    raise UserError(
                        f"a preprocessed image must be uint8[{size}, {size}, 3], "
                        f"not {square.dtype}{list(square.shape)}"
                    )
                yield square

        return self._run(self._embed_image, checked())

    def embed_images(
        self, images: Iterable[UInt8[np.ndarray, "h w 3"]]
    ) -> Float32[np.ndarray, "n d"]:
        """Embeds sRGB images of any size, after `preprocess`. It takes one batch at a time.

        Raises:
          UserError: an image is not uint8[h, w, 3], or has no pixels.
        """
        return self.embed_preprocessed(map(self.preprocess, images))

    def embed_documents(self, documents: Sequence[Document]) -> Float32[np.ndarray, "n d"]:
        """Embeds documents: the normalised mean of the unit vectors of all texts and images.

        CM3Leon (section 2.1) averages the normalised text and image embeddings of a pair. The mean
        is normalised again so that the inner product of two documents is a cosine.

        Raises:
          UserError: a document has neither text nor an image with pixels.
        """
        texts: list[tuple[int, str]] = []
        images: list[tuple[int, np.ndarray]] = []
        for number, document in enumerate(documents):
            count = len(texts) + len(images)
            for part in document.parts:
                if isinstance(part, Text):
                    texts.append((number, part.text))
                elif isinstance(part, Image) and part.pixels is not None:
                    images.append((number, part.pixels))
            if len(texts) + len(images) == count:
                raise UserError(
                    f"document {number} has neither text nor pixels, so it has no embedding"
                )
        total = np.zeros((len(documents), self.dimensions), np.float32)
        np.add.at(total, [n for n, _ in texts], self.embed_texts([text for _, text in texts]))
        np.add.at(total, [n for n, _ in images], self.embed_images([image for _, image in images]))
        return normalise(total)

    def _run(self, function, rows) -> Float32[np.ndarray, "n d"]:
        results = [np.zeros((0, self.dimensions), np.float32)]
        for batch in _batches(rows, self.batch_size):
            # A short last batch repeats its first row, so that one compiled program serves all.
            padded = batch + [batch[0]] * (self.batch_size - len(batch))
            results.append(sharding.fetch(function(self.model, np.stack(padded)))[: len(batch)])
        return np.concatenate(results)


def plain_square(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Crops and resizes an image for an encoder that leon_jax trained.

    This is the square in the centre after `leon_jax.data.augment.plain`, rounded. Images of eight
    times the size and more are first averaged over blocks of pixels, which is faster.
    """
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    factor = side // (4 * size)
    if factor > 1:
        pixels = np.asarray(PIL.Image.fromarray(pixels).reduce(factor))
    return np.rint(255 * plain(pixels, size)).astype(np.uint8)


def normalise(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Scales rows to length 1; a row of zeros stays zero."""
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
