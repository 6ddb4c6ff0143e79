"""Images and texts as people have them, as parts of documents."""

import os

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from leon_jax.config import UserError
from leon_jax.data import image_files
from leon_jax.documents import Image, Text, normalise_text

ImageInput = str | os.PathLike | PIL.Image.Image | UInt8[np.ndarray, "height width 3"]


def text_part(name: str, text: str) -> Text:
    """A text from a person, in Unicode NFC and with single white space.

    Args:
      name: how errors call it.
      text: any text.

    Raises:
      UserError: it cannot be encoded.
    """
    try:
        return Text(normalise_text(text))
    except ValueError as error:
        raise UserError(f"the {name} cannot be read: {error}") from error


def image_part(image: ImageInput) -> Image:
    """An image as a part of a document.

    Args:
      image: a file, a PIL image, or sRGB uint8[height, width, 3].

    Raises:
      UserError: it cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = image_files.read(image)
    if isinstance(image, PIL.Image.Image):
        image = np.asarray(image_files.on_white(image))
    try:
        return Image(pixels=image)
    except (TypeError, ValueError) as error:
        raise UserError(f"the image cannot be read: {error}") from error
