"""The image tokenizer as its users see it: pictures in, a grid of codes out, and back."""

import os

import jax
import numpy as np
import PIL.Image
from flax import nnx
from jaxtyping import Float, Int, UInt8

from leon_jax import config as configs
from leon_jax import sharding, weight_files
from leon_jax.models.vqgan import VQGAN, VQGANConfig


class ImageTokenizer:
    """A trained VQ-GAN with its picture preprocessing.

    Args:
      model: the network.
      batch_size: pictures a compiled call; other counts are cut into calls of this size, the last
        one padded, so that one program serves them all.
    """

    def __init__(self, model: VQGAN, batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self._encode = jax.jit(lambda model, images: model.encode(images))
        self._decode = jax.jit(lambda model, codes: model.decode(codes))

    @classmethod
    def load(cls, path: str | os.PathLike, batch_size: int = 64) -> "ImageTokenizer":
        """Reads a `tokenizer.safetensors`.

        Raises:
          UserError: the file is missing, damaged or of another kind.
        """
        arrays, values = weight_files.load(path, "tokenizer")
        config = configs.build(VQGANConfig, values, "config")
        abstract = jax.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0)))
        return cls(weight_files.restore(abstract, arrays, str(path)), batch_size)

    @property
    def resolution(self) -> int:
        """Height and width of a picture, in pixels."""
        return self.model.config.resolution

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid of codes."""
        return (self.model.config.grid, self.model.config.grid)

    @property
    def codes(self) -> int:
        """Entries of the codebook."""
        return self.model.config.codes

    def preprocess(
        self, picture: PIL.Image.Image | UInt8[np.ndarray, "h w 3"]
    ) -> Float[np.ndarray, "r r 3"]:
        """A picture at the tokenizer's resolution, float32 in [-1, 1] (see `fit_picture`)."""
        return normalize(fit_picture(picture, self.resolution))

    def encode(self, images: Float[np.ndarray, "b r r 3"]) -> Int[np.ndarray, "b i j"]:
        """The codes of pictures in [-1, 1]."""
        return self._batched(self._encode, np.asarray(images, np.float32))

    def decode(self, codes: Int[np.ndarray, "b i j"]) -> Float[np.ndarray, "b r r 3"]:
        """The pictures of codes, float32, clipped to [-1, 1].

        Raises:
          ValueError: a code is outside the codebook.
        """
        codes = np.asarray(codes, np.int32)
        if codes.size and (codes.min() < 0 or codes.max() >= self.codes):
            raise ValueError(f"codes must be between 0 and {self.codes - 1}")
        return np.clip(self._batched(self._decode, codes), -1.0, 1.0)

    def _batched(self, function, inputs: np.ndarray) -> np.ndarray:
        size = min(self.batch_size, len(inputs))
        outputs = []
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
            outputs.append(sharding.fetch(function(self.model, padded))[: len(batch)])
        return np.concatenate(outputs)


def fit_picture(
    picture: PIL.Image.Image | UInt8[np.ndarray, "h w 3"], resolution: int
) -> UInt8[np.ndarray, "r r 3"]:
    """Transparency on white, shorter side to `resolution` (Lanczos), centre crop, RGB."""
    if not isinstance(picture, PIL.Image.Image):
        picture = PIL.Image.fromarray(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return np.asarray(picture.crop((left, top, left + resolution, top + resolution)))


def normalize(pixels: UInt8[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b h w 3"]:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def to_pixels(images: Float[np.ndarray, "*b h w 3"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Pictures in [-1, 1] to uint8 pixels."""
    return np.round((np.clip(np.asarray(images), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
