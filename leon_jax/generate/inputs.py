"""Converts a user's images and texts to parts of documents."""

import os

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from leon_jax.config import UserError
from leon_jax.data import image_files
from leon_jax.documents import Image, Text, normalise_text

ImageInput = str | os.PathLike | PIL.Image.Image | UInt8[np.ndarray, "height width 3"]


def text_part(name: str, text: str) -> Text:
    """Returns a user's text as a part, in Unicode NFC, with one space between words.

    Args:
      name: name of the text in error messages.
      text: the text.

    Raises:
      UserError: the text is no string, or has a lone surrogate, which cannot be encoded.
    """
    if not isinstance(text, str):
        raise UserError(f"the {name} is a {type(text).__name__}; it must be a string")
    try:
        return Text(normalise_text(text))
    except ValueError as error:
        raise UserError(f"the {name} cannot be read: {error}") from error


def image_part(image: ImageInput) -> Image:
    """Returns a user's image as a part with pixels. Transparency is composited on white.

    Args:
      image: a file, a PIL image, or sRGB uint8[height, width, 3].

    Raises:
      UserError: the image cannot be read, or the array has another dtype or shape.
    """
    if isinstance(image, str | os.PathLike):
        image = image_files.read(image)
    if isinstance(image, PIL.Image.Image):
        image = np.asarray(image_files.on_white(image))
    try:
        return Image(pixels=image)
    except (TypeError, ValueError) as error:
        raise UserError(f"the image cannot be read: {error}") from error
