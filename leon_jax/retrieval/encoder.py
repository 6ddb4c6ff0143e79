"""The frozen encoder: texts, pictures and whole documents to unit vectors."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32, UInt8

from leon_jax import sharding, weight_files
from leon_jax.config import UserError, build
from leon_jax.data.augment import plain
from leon_jax.documents import Document, Image, Text
from leon_jax.models.clip import CLIP, CLIPConfig, TextConfig, create
from leon_jax.retrieval import openai_clip
from leon_jax.tokenizers.clip_text import CLIPTextTokenizer
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


class RetrievalEncoder:
    """A CLIP with its text tokenizer, on a fixed batch size; call it under `jax.set_mesh`.

    Texts and pictures are host values; embeddings are float32[n, d] with rows of length 1.

    Args:
      model: both towers.
      text: text to ids and back; `frame` adds start, end and padding.
      square: any picture to uint8[size, size, 3], as the model was trained to see it.
      batch_size: texts or pictures that are embedded at once.
    """

    def __init__(
        self,
        model: CLIP,
        text: TextTokenizer | CLIPTextTokenizer,
        square: Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[np.ndarray, "size size 3"]],
        batch_size: int = 64,
    ):
        self.model, self.text, self.batch_size = model, text, batch_size
        self._square = square
        self._image = jax.jit(lambda model, squares: model.embed_image(squares / 255))
        self._text = jax.jit(lambda model, ids: model.embed_text(ids))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        text_tokenizer: TextTokenizer | None = None,
        batch_size: int = 64,
    ) -> "RetrievalEncoder":
        """Reads an encoder of ours, or OpenAI's CLIP.

        The near-copy thresholds of `SelectionConfig`, 0.9, are those of CLIP ViT-B/32; an encoder
        of ours has its own (docs/retrieval.md).

        Args:
          path: `encoder.safetensors`; or the folder of a CLIP as transformers writes it, which
            brings its own text tokenizer (see `leon_jax.retrieval.openai_clip`).
          text_tokenizer: what our encoder was trained with; None: `text.json` beside it.
          batch_size: texts or pictures that are embedded at once.

        Raises:
          UserError: a file is missing, damaged, of another kind, or made for another tokenizer.
        """
        path = pathlib.Path(path)
        if path.is_dir():
            return cls(*openai_clip.load(path), batch_size)
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
        square = functools.partial(plain_square, size=config.vision.image_size)
        return cls(model, text, square, batch_size)

    @property
    def dimensions(self) -> int:
        """Length of an embedding."""
        return self.model.config.embed_dim

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Embeds each text; what exceeds the context length is cut off."""
        config = self.model.config.text
        ids = [frame(self.text.encode(text), config) for text in texts]
        return self._run(self._text, ids)

    def preprocess(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """A picture of any size as the square that `embed_preprocessed` takes.

        It needs no mesh, so that pictures can be made small where they are read.

        Raises:
          UserError: the picture is not uint8[h, w, 3], or has no pixels.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
            raise UserError(
                f"a picture must be uint8[h, w, 3], not {pixels.dtype}{list(pixels.shape)}"
            )
        return self._square(pixels)

    def embed_preprocessed(
        self, squares: Iterable[UInt8[np.ndarray, "size size 3"]]
    ) -> Float32[np.ndarray, "n d"]:
        """Embeds what `preprocess` returned, taking a batch at a time.

        Raises:
          UserError: a picture is not such a square.
        """
        size = self.model.config.vision.image_size

        def checked() -> Iterator[np.ndarray]:
            for square in squares:
                if square.dtype != np.uint8 or square.shape != (size, size, 3):
                    raise UserError(
                        f"a preprocessed picture must be uint8[{size}, {size}, 3], "
                        f"not {square.dtype}{list(square.shape)}"
                    )
                yield square

        return self._run(self._image, checked())

    def embed_images(
        self, images: Iterable[UInt8[np.ndarray, "h w 3"]]
    ) -> Float32[np.ndarray, "n d"]:
        """Embeds sRGB pictures of any size, as they come; each goes through `preprocess`.

        Raises:
          UserError: a picture is not uint8[h, w, 3], or has no pixels.
        """
        return self.embed_preprocessed(map(self.preprocess, images))

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

    def _run(self, function, rows) -> Float32[np.ndarray, "n d"]:
        results = [np.zeros((0, self.dimensions), np.float32)]
        for batch in _batches(rows, self.batch_size):
            # One shape, one compilation: a short last batch repeats its first row.
            filled = batch + [batch[0]] * (self.batch_size - len(batch))
            results.append(sharding.fetch(function(self.model, np.stack(filled)))[: len(batch)])
        return np.concatenate(results)


def plain_square(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """`leon_jax.data.augment.plain`, rounded: what our encoders see of a picture.

    Pictures of eight times the size and more are first averaged over blocks, which costs less.
    """
    factor = min(pixels.shape[:2]) // (4 * size)
    if factor > 1:
        pixels = np.asarray(PIL.Image.fromarray(pixels).reduce(factor))
    return np.rint(255 * plain(pixels, size)).astype(np.uint8)


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
