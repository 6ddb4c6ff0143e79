"""Reads untrusted image files safely, and writes PNG files with metadata.

`leon prepare` and `leon generate` read images with `decode`, so both treat a file alike. The header
of a file is checked before any pixel is decoded, so a file that claims a huge image costs no
memory. A written file carries metadata as PNG text chunks (prompt, seed, model, licences of the
retrieved documents) and is renamed to its final name once it is complete.
"""

import io
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
from leon_jax.data import colours, image_formats, svg_files
from leon_jax.data.image_error import ImageError

MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 64 * 2**20
_HEAD_BYTES = 2**16
# Files of these formats may hold more images than the one to show, and are no animations: a
# camera's JPEG with a preview, and a phone's HEIC with a burst.
_FIRST_OF_MANY = ("MPO", "HEIF")
_REDUCED = 254  # the TIFF tag NewSubfileType; its bit 0 marks a smaller copy


def read(path: str | os.PathLike) -> Image.Image:
    """Reads an image file. The image is upright, in mode RGB, with transparency on white.

    Raises:
      ImageError: the file is missing, empty or not readable, has more than `MAX_SIDE` pixels on a
        side or `MAX_PIXELS` pixels in total, or cannot be used for another reason (`decode`).
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ImageError(f"there is no image at {path}")
    if not path.is_file():
        raise ImageError(f"{path} is not a file; give the path of an image")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty; give a PNG or JPEG image")
    try:
        with path.open("rb") as file:
            return decode(file, str(path))
    except PermissionError:
        raise ImageError(f"{path} is not readable; check its permissions") from None


def decode(file: BinaryIO, name: str) -> Image.Image:
    """Decodes an open image file. The image is upright, in mode RGB, with transparency on white.

    Colours are converted to 8-bit sRGB (`colours.py`), and SVG drawings are rasterised. Of a
    camera's JPEG with several images the first one is taken.

    Args:
      file: the open file, read from its start. The size in its header is checked before decoding.
      name: name of the image in error messages.

    Raises:
      ImageError: the image is damaged, too large, an animation, in another format, in a format
        whose package is not installed, or has colours that cannot be converted. Its `reason` is
        one of `leon_jax.data.sources.raw_record.REASONS`.
    """
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    drawing = svg_files.is_svg(head)
    if drawing:
        file = io.BytesIO(svg_files.rasterise(file.read(), name))
    formats = ("PNG",) if drawing else image_formats.readable_formats(head, name)
    if image_formats.is_jpeg_xl(head):
        _check_jpeg_xl(head, name)
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images; `_check_size` has a lower limit.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=formats) as image:
                _check_size(image.size, name)
                if _is_animation(image):
                    raise _animation(name)
                image.load()
                if drawing and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
                    raise ImageError(f"{name} is an SVG drawing that shows nothing")
                return colours.to_rgb(_upright(image), name)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(_too_large(name), "picture_too_large") from None
    except UnidentifiedImageError:
        names = ", ".join(name for name in image_formats.FORMATS if name != "MPO")
        raise ImageError(
            f"{name} is not an image in {names}, HEIC, JPEG XL or SVG format"
        ) from None
    except Exception as error:  # decoders raise many kinds of exceptions for damaged files
        raise ImageError(f"{name} is damaged or truncated") from error


def on_white(image: Image.Image) -> Image.Image:
    """Returns a copy of a loaded image in 8-bit sRGB, mode RGB, with transparency on white.

    Raises:
      ImageError: the colours cannot be converted (`colours.to_rgb`).
    """
    return colours.to_rgb(image, "the image")


def _upright(image: Image.Image) -> Image.Image:
    """Returns an image that is rotated as its EXIF data says."""
    # The decoder of JPEG XL has rotated the image, unless it restored a JPEG.
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return image
    upright = ImageOps.exif_transpose(image)
    if upright is not image:  # what `colours.to_rgb` reads of the file
        upright.format = image.format
        upright.tag_v2 = getattr(image, "tag_v2", {})  # type: ignore[attr-defined]
    return upright


def _is_animation(image: Image.Image) -> bool:
    """Tells whether a file has several images of which none is the one to show."""
    if not getattr(image, "is_animated", False) or image.format in _FIRST_OF_MANY:
        return False
    if image.format != "TIFF":
        return True
    try:
        for number in range(1, image.n_frames):  # type: ignore[attr-defined]
            image.seek(number)
            if not image.tag_v2.get(_REDUCED, 0) & 1:  # type: ignore[attr-defined]
                return True
    finally:
        image.seek(0)
    return False


def _check_jpeg_xl(head: bytes, name: str) -> None:
    header = image_formats.jpeg_xl_header(head)
    if header is None:
        raise ImageError(f"{name} is damaged or truncated")
    _check_size(header.size, name)
    if header.animated:
        raise _animation(name)


def _animation(name: str) -> ImageError:
    return ImageError(
        f"{name} is an animation or has several pages; give one image of it", "picture_animated"
    )


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
