"""Pictures as people have them: read from any file with care, written whole with their story.

A picture from outside is checked by its header before a pixel is decoded, so a file that claims to
be enormous costs nothing. A picture that we write carries its prompt, seed, model and the retrieved
documents' licences as PNG text, and appears under its name only when it is complete.
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
LARGEST_SIDE = 16_384
LARGEST_AREA = 64 * 2**20
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


class ImageError(UserError):
    """A picture that cannot be used.

    Attributes:
      reason: in a word, for counting.
    """

    def __init__(self, message: str, reason: Reason = "picture_unreadable"):
        super().__init__(message)
        self.reason = reason


def read(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, upright, on white where it is transparent, mode RGB.

    Raises:
      ImageError: the file is missing, empty, truncated, no picture in one of `FORMATS`, or larger
        than `LARGEST_SIDE` on a side or `LARGEST_AREA` pixels.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ImageError(f"there is no picture at {path}")
    if not path.is_file():
        raise ImageError(f"{path} is not a file; give the path of a picture")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty; give a {' or '.join(FORMATS[:2])} picture")
    try:
        with path.open("rb") as file:
            return decode(file, str(path))
    except PermissionError:
        raise ImageError(f"{path} may not be read; check its permissions") from None


def decode(file: BinaryIO, name: str, *, plain: bool = False) -> Image.Image:
    """The picture in an open file, upright, on white where it is transparent, mode RGB.

    Args:
      file: read from its start; nothing is decoded before the size in its header is checked.
      name: what errors call it.
      plain: whether to refuse what has no one obvious RGB picture: animations, and colours other
        than 8-bit RGB, grey or a palette (16-bit greys would be clipped, CMYK needs its profile).

    Raises:
      ImageError: it is damaged, too large, in another format, or refused by `plain`; its
        `reason` is one of `leon_jax.data.sources.raw_record.REASONS`.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit below is lower than the one Pillow warns about.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as picture:
                _check_size(picture.size, name)
                if plain and picture.mode not in _PLAIN_MODES:
                    raise ImageError(
                        f"{name} has colours of the kind {picture.mode}; 8-bit RGB, grey and "
                        "palettes are read",
                        "picture_mode",
                    )
                if plain and getattr(picture, "is_animated", False):
                    raise ImageError(f"{name} is an animation", "picture_animated")
                picture.load()
                return on_white(ImageOps.exif_transpose(picture))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(_too_large(name), "picture_too_large") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in {', '.join(FORMATS)} format") from None
    except Exception as error:  # decoders raise many kinds for damaged files
        raise ImageError(f"{name} is damaged or cut short") from error


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB, transparent parts laid on white."""
    if picture.mode == "RGB":
        return picture.copy()
    if picture.mode == "RGBA" or "transparency" in picture.info or picture.mode in ("LA", "PA"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def write_png(
    path: str | os.PathLike, pixels: UInt8[np.ndarray, "height width 3"], text: Mapping[str, str]
) -> None:
    """Writes a PNG with text chunks to `path`, whole or not at all.

    Args:
      path: the file; its folder exists.
      pixels: sRGB.
      text: the text chunks, any unicode.
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
    """Checks that files can be written into a folder that may not exist yet; makes nothing.

    Raises:
      UserError: something in the way is not a folder, or writing is not allowed.
    """
    path = pathlib.Path(path)
    parent = path.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot write into {path}: {parent} is not a folder")
    try:
        # Asking the file system is the only sure way: permission bits do not tell of read-only
        # mounts, and mean nothing to root.
        with tempfile.TemporaryDirectory(prefix=".leon_", dir=parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}") from None
    return path


def _check_size(size: tuple[int, int], name: str) -> None:
    if max(size) > LARGEST_SIDE or size[0] * size[1] > LARGEST_AREA:
        raise ImageError(_too_large(name, size), "picture_too_large")


def _too_large(name: str, size: tuple[int, int] | None = None) -> str:
    measured = f"{size[0]} x {size[1]} pixels" if size else "too many pixels"
    return (
        f"{name} has {measured}; a picture may have {LARGEST_SIDE} on a side "
        f"and {LARGEST_AREA // 2**20} million in all, so make it smaller first"
    )
