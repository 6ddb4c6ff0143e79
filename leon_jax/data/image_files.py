"""Reads untrusted image files safely, and writes PNG files with metadata.

The header of a file is checked before any pixel is decoded, so a file that claims a huge image
costs no memory. A written file carries metadata as PNG text chunks (prompt, seed, model, licences
of the retrieved documents) and is renamed to its final name once it is complete.
"""

import os
import pathlib
import tempfile
import warnings
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from leon_jax.config import UserError
from leon_jax.data.sources.raw_record import Reason

# Formats whose decoders are self-contained (no interpreter, no external program).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 64 * 2**20
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


class ImageError(UserError):
    """An image that cannot be used.

    Attributes:
      reason: the reject reason, for counting.
    """

    def __init__(self, message: str, reason: Reason = "picture_unreadable"):
        super().__init__(message)
        self.reason = reason


def read(path: str | os.PathLike) -> Image.Image:
    """Reads an image file. The image is upright, in mode RGB, with transparency on white.

    Raises:
      ImageError: the file is missing, empty, truncated, not an image in one of `FORMATS`, or has
        more than `MAX_SIDE` pixels on a side or `MAX_PIXELS` pixels in total.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ImageError(f"there is no image at {path}")
    if not path.is_file():
        raise ImageError(f"{path} is not a file; give the path of an image")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty; give a {' or '.join(FORMATS[:2])} image")
    try:
        with path.open("rb") as file:
            return decode(file, str(path))
    except PermissionError:
        raise ImageError(f"{path} is not readable; check its permissions") from None


def decode(file: BinaryIO, name: str, *, plain: bool = False) -> Image.Image:
    """Decodes an open image file. The image is upright, in mode RGB, with transparency on white.

    Args:
      file: the open file, read from its start. The size in its header is checked before decoding.
      name: name of the image in error messages.
      plain: whether to reject images that do not convert to RGB unambiguously: animations, and
        colours other than 8-bit RGB, grey or a palette (16-bit grey would be clipped, CMYK needs
        its colour profile).

    Raises:
      ImageError: the image is damaged, too large, in another format, or rejected by `plain`. Its
        `reason` is one of `leon_jax.data.sources.raw_record.REASONS`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images; `_check_size` has a lower limit.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image.size, name)
                if plain and image.mode not in _PLAIN_MODES:
                    raise ImageError(
                        f"{name} has the colour mode {image.mode}; it must be 8-bit RGB, grey or "
                        "a palette",
                        "picture_mode",
                    )
                if plain and getattr(image, "is_animated", False):
                    raise ImageError(f"{name} is an animation", "picture_animated")
                image.load()
                return on_white(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(_too_large(name), "picture_too_large") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in {', '.join(FORMATS)} format") from None
    except Exception as error:  # decoders raise many kinds of exceptions for damaged files
        raise ImageError(f"{name} is damaged or truncated") from error


def on_white(image: Image.Image) -> Image.Image:
    """Returns a copy of an image in mode RGB, with transparency composited on white."""
    if image.mode == "RGB":
        return image.copy()
    if image.mode == "RGBA" or "transparency" in image.info or image.mode in ("LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def write_png(
    path: str | os.PathLike, pixels: UInt8[np.ndarray, "height width 3"], text: Mapping[str, str]
) -> None:
    """Writes a PNG file with text chunks, atomically.

    Args:
      path: the file; its folder exists.
      pixels: the image in sRGB.
      text: the text chunks by key, in any Unicode.
    """
    path = pathlib.Path(path)
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | os.PathLike) -> pathlib.Path:
    """Checks that a folder, which may not exist yet, is writable. It does not create the folder.

    Raises:
      UserError: the path or a parent of it is not a folder, or writing is not permitted.
    """
    path = pathlib.Path(path)
    parent = path.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot write into {path}: {parent} is not a folder")
    try:
        # Try to write: permission bits do not show read-only mounts, and root ignores them.
        with tempfile.TemporaryDirectory(prefix=".leon_", dir=parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}") from None
    return path


def _check_size(size: tuple[int, int], name: str) -> None:
    if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
        raise ImageError(_too_large(name, size), "picture_too_large")


def _too_large(name: str, size: tuple[int, int] | None = None) -> str:
    pixels = f"{size[0]} x {size[1]} pixels" if size else "too many pixels"
    return (
        f"{name} has {pixels}; resize it to at most {MAX_SIDE} pixels on a side "
        f"and {MAX_PIXELS // 2**20} million pixels in total"
    )
