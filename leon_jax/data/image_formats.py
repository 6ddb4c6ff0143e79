"""Recognises image formats by their first bytes, and loads the decoders that extras install.

Pillow reads most formats itself. HEIC needs the package pillow-heif, and JPEG XL needs
pillow-jxl-plugin; both register themselves with Pillow. SVG drawings are rasterised first
(`svg_files.py`).
"""

import dataclasses
from collections.abc import Callable

from leon_jax.data.image_error import ImageError

# Formats of Pillow with self-contained decoders (no interpreter, no external program). JPEG is also
# the camera format MPO.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Endings of image files, in lower case.
ENDINGS = (
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif",
    "heic", "heif", "jxl", "svg", "svgz", "mpo", "jpe", "jfif", "apng",
)  # fmt: skip
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_JXL_CODESTREAM = b"\xff\x0a"
_JXL_CONTAINER = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
# Width to height of a JPEG XL image by the code in its header; 0 means a width of its own.
_JXL_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def readable_formats(data: bytes, name: str) -> tuple[str, ...]:
    """Returns the formats that Pillow may read a file as; loads the decoder that it needs.

    Args:
      data: the file, or its first 64 KiB.
      name: name of the image in error messages.

    Raises:
      ImageError: the decoder is in a package that is not installed.
    """
    if is_heic(data):
        return (*FORMATS, _load(_load_heif, "a HEIC image", "pillow-heif", name))
    if is_jpeg_xl(data):
        return (*FORMATS, _load(_load_jxl, "a JPEG XL image", "pillow-jxl-plugin", name))
    return FORMATS


def is_heic(data: bytes) -> bool:
    """Tells whether a file is a HEIC image. AVIF images have the same container."""
    if data[4:8] != b"ftyp":
        return False
    box = data[8 : max(12, min(int.from_bytes(data[:4], "big"), 256))]
    brands = {box[start : start + 4] for start in range(0, len(box), 4)}
    return bool(brands & _HEIC_BRANDS) and not brands & _AVIF_BRANDS


def is_jpeg_xl(data: bytes) -> bool:
    """Tells whether a file is a JPEG XL image, in a container or without one."""
    return data.startswith((_JXL_CODESTREAM, _JXL_CONTAINER))


@dataclasses.dataclass(frozen=True)
class JpegXlHeader:
    """What the header of a JPEG XL image says.

    Attributes:
      size: (width, height) in pixels.
      animated: whether the image is an animation.
    """

    size: tuple[int, int]
    animated: bool


def jpeg_xl_header(data: bytes) -> JpegXlHeader | None:
    """Reads the header of a JPEG XL image (ISO 18181-1, annex D).

    Its decoder decodes the image when it opens the file, so the size is checked before.

    Args:
      data: the file, or its first 64 KiB.

    Returns:
      The header, or None if it is not there.
    """
    start = _codestream(data)
    if start is None:
        return None
    bits = _Bits(data[start + 2 : start + 64])
    size = _jxl_size(bits)
    all_default = bits.read(1)
    animated = False
    if not all_default and bits.read(1):
        bits.read(3)  # the orientation
        if bits.read(1):
            _jxl_size(bits)  # the size to show it in
        has_preview = bits.read(1)
        # A preview has a header of its own before this bit; such a file is read as a still image.
        animated = not has_preview and bool(bits.read(1))
    return JpegXlHeader(size, animated)


def _jxl_size(bits: "_Bits") -> tuple[int, int]:
    small = bits.read(1)
    height = _jxl_length(bits, small)
    ratio = bits.read(3)
    if ratio == 0:
        return _jxl_length(bits, small), height
    numerator, denominator = _JXL_RATIOS[ratio]
    return height * numerator // denominator, height


def _jxl_length(bits: "_Bits", small: int) -> int:
    if small:
        return (bits.read(5) + 1) * 8
    return bits.read((9, 13, 18, 30)[bits.read(2)]) + 1


def _codestream(data: bytes) -> int | None:
    """Returns where the codestream of a JPEG XL file starts."""
    if data.startswith(_JXL_CODESTREAM):
        return 0
    position = 0
    while position + 8 <= len(data):
        length, kind = (
            int.from_bytes(data[position : position + 4], "big"),
            data[position + 4 :][:4],
        )
        header = 8
        if length == 1:
            length, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        start = position + header + (4 if kind == b"jxlp" else 0)
        if kind in (b"jxlc", b"jxlp"):
            return start if data[start : start + 2] == _JXL_CODESTREAM else None
        if length < header:
            return None
        position += length
    return None


class _Bits:
    """Reads unsigned numbers from bytes, the lowest bit first; bits behind the end are 0."""

    def __init__(self, data: bytes):
        self._value = int.from_bytes(data, "little")

    def read(self, count: int) -> int:
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        return value


def _load(load: Callable[[], str], kind: str, package: str, name: str) -> str:
    try:
        return load()
    except ImportError:
        raise ImageError(
            f"{name} is {kind}, which needs the package {package}; "
            "run: pip install 'leon_jax[images]'"
        ) from None


def _load_heif() -> str:
    import pillow_heif

    pillow_heif.register_heif_opener()
    return "HEIF"


def _load_jxl() -> str:
    import pillow_jxl  # noqa: F401  (it registers itself)

    return "JXL"
