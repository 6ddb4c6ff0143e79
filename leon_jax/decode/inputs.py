"""What people give: pictures and texts in any form they have them, as parts of documents."""

import os

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from leon_jax.config import UserError
from leon_jax.data import pictures
from leon_jax.documents import Image, Text

Picture = str | os.PathLike | PIL.Image.Image | UInt8[np.ndarray, "height width 3"]


def text_part(name: str, text: str) -> Text:
    """A text that a person gave.

    Raises:
      UserError: no encoding can write it.
    """
    try:
        return Text(text)
    except ValueError as error:
        raise UserError(f"the {name} cannot be read: {error}") from error


def picture_part(image: Picture) -> Image:
    """A picture in any of the forms people have it, as a part of a document.

    Raises:
      UserError: it cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = pictures.read(image)
    if isinstance(image, PIL.Image.Image):
        image = np.asarray(pictures.on_white(image))
    try:
        return Image(pixels=image)
    except (TypeError, ValueError) as error:
        raise UserError(f"the picture cannot be read: {error}") from error
