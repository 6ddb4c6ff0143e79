"""The image tokenizer: converts images to grids of codes and back."""

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
    """A trained VQ-GAN with its image preprocessing.

    Args:
      model: the network.
      batch_size: images of a compiled call. The input is split into batches of this size and the
        last batch is padded, so that one compiled program serves all sizes.
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
        """Height and width of an image, in pixels."""
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
        self, image: PIL.Image.Image | UInt8[np.ndarray, "h w 3"]
    ) -> Float[np.ndarray, "r r 3"]:
        """Converts an image to the tokenizer's resolution (see `fit_image`), float32 in [-1, 1]."""
        return normalize(fit_image(image, self.resolution))

    def encode(self, images: Float[np.ndarray, "b r r 3"]) -> Int[np.ndarray, "b i j"]:
        """Encodes images in [-1, 1] to codes."""
        return self._batched(self._encode, np.asarray(images, np.float32))

    def decode(self, codes: Int[np.ndarray, "b i j"]) -> Float[np.ndarray, "b r r 3"]:
        """Decodes codes to images, float32, clipped to [-1, 1].

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


def fit_image(
    image: PIL.Image.Image | UInt8[np.ndarray, "h w 3"], resolution: int
) -> UInt8[np.ndarray, "r r 3"]:
    """Converts an image to an RGB square of `resolution` pixels a side.

    Transparent pixels are blended with white. The shorter side is resized to `resolution` with the
    Lanczos filter, and the centre is cropped.
    """
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.fromarray(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    image = image.convert("RGB")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def normalize(pixels: UInt8[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b h w 3"]:
    """Converts uint8 pixels to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def to_pixels(images: Float[np.ndarray, "*b h w 3"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Converts images in [-1, 1] to uint8 pixels. Other values are clipped."""
    return np.round((np.clip(np.asarray(images), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
