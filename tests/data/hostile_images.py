"""Image files with false headers, decompression bombs, truncations and unusual modes.

Most images are small, so that thousands are made in seconds.
"""

import functools
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

USED = "used"
UNREADABLE = frozenset({"picture_unreadable"})
TOO_LARGE = frozenset({"picture_too_large"})
ANIMATED = frozenset({"picture_animated"})
MODE = frozenset({"picture_mode"})
# Decoders differ in the errors they tolerate, and a changed byte may have any effect.
TOLERATED = UNREADABLE | {USED}
ANY_OUTCOME = TOLERATED | TOO_LARGE | ANIMATED | MODE | {"picture_too_small", "picture_too_narrow"}

_SIDE = 64


def pixels(rng: np.random.Generator, height: int = _SIDE, width: int = _SIDE) -> np.ndarray:
    """A random image of coloured tiles, uint8[height, width, 3]."""
    tiles = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return tiles[np.arange(height) * 8 // height][:, np.arange(width) * 8 // width]


def encoded(array: np.ndarray, form: str, **options) -> bytes:
    """The array as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def good(rng: np.random.Generator) -> bytes:
    """A valid image file."""
    form = ("jpeg", "png", "jpeg", "webp")[rng.integers(4)]
    return encoded(pixels(rng), form, **({"compress_level": 1} if form == "png" else {}))


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file, with its checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, *, depth=8, colour=2, extra: bytes = b"") -> bytes:
    """A PNG file with the given header and compressed data, which need not be consistent."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


@functools.cache
def zeros(size: int) -> bytes:
    """`size` zeros, compressed by zlib to a thousandth."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size // 2**20)) + packer.flush()


def rows(array: np.ndarray) -> bytes:
    """The compressed data of a PNG file with these pixels."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array), 1)


def _cut(rng, form):
    data = encoded(pixels(rng), form)
    return data[: rng.integers(int(len(data) * 0.9))]


def _claims_60000(rng):
    data = bytearray(encoded(pixels(rng), "jpeg"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def _flipped(rng):
    data = bytearray(good(rng))
    for position in rng.integers(len(data), size=8):
        data[position] ^= int(rng.integers(1, 256))
    return bytes(data)


def _bad_sum(rng, name):
    data = bytearray(png(_SIDE, _SIDE, rows(pixels(rng))))
    start = data.index(name)
    length = struct.unpack(">I", data[start - 4 : start])[0]
    data[start + 4 + length] ^= 0xFF
    return bytes(data)


def _cmyk(rng):
    buffer = io.BytesIO()
    Image.fromarray(pixels(rng)).convert("CMYK").save(buffer, "jpeg")
    return buffer.getvalue()


def _animated(rng, form):
    first, second = (Image.fromarray(pixels(rng)) for _ in range(2))
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=[second])
    return buffer.getvalue()


def _gif_of_65535(rng):
    data = bytearray(encoded(pixels(rng), "gif"))
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def _bmp_of(width, height, rng):
    data = bytearray(encoded(pixels(rng), "bmp"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


# Name -> a function that makes an image file, and the acceptable outcomes.
HOSTILE: dict[str, tuple[Callable[[np.random.Generator], bytes], frozenset[str]]] = {
    "empty": (lambda rng: b"", UNREADABLE),
    "cut jpeg": (lambda rng: _cut(rng, "jpeg"), UNREADABLE),
    "cut png": (lambda rng: _cut(rng, "png"), UNREADABLE),
    "cut webp": (lambda rng: _cut(rng, "webp"), UNREADABLE),
    "changed bytes": (_flipped, ANY_OUTCOME),
    "noise": (lambda rng: rng.bytes(500), UNREADABLE),
    "page": (lambda rng: b"<!DOCTYPE html><html><body>404</body></html>", UNREADABLE),
    "drawing": (lambda rng: b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNREADABLE),
    "program": (lambda rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UNREADABLE),
    "jpeg of 60,000 x 60,000": (_claims_60000, TOO_LARGE),
    "png of 60,000 x 60,000": (lambda rng: png(60_000, 60_000, rows(pixels(rng))), TOO_LARGE),
    "png of 2 ** 31 - 1": (
        lambda rng: png(2**31 - 1, 2**31 - 1, rows(pixels(rng))),
        TOO_LARGE | UNREADABLE,
    ),
    "png of no size": (lambda rng: png(0, 0, rows(pixels(rng))), UNREADABLE),
    "gif of 65,535 x 65,535": (_gif_of_65535, TOO_LARGE),
    "bmp of 50,000 x 50,000": (lambda rng: _bmp_of(50_000, 50_000, rng), TOO_LARGE),
    "bmp upside down": (lambda rng: _bmp_of(_SIDE, -_SIDE, rng), TOLERATED),
    # A black image of 400 million pixels takes 50 kB.
    "bomb": (lambda rng: png(20_000, 20_000, zeros(48 * 2**20), depth=1, colour=0), TOO_LARGE),
    "bomb behind a small header": (lambda rng: png(_SIDE, _SIDE, zeros(64 * 2**20)), TOLERATED),
    "bomb in a comment": (
        lambda rng: png(
            _SIDE,
            _SIDE,
            rows(pixels(rng)),
            extra=chunk(b"zTXt", b"Comment\0\0" + zeros(64 * 2**20)),
        ),
        TOLERATED,
    ),
    "bomb in a profile": (
        lambda rng: png(
            _SIDE,
            _SIDE,
            rows(pixels(rng)),
            extra=chunk(b"iCCP", b"profile\0\0" + zeros(64 * 2**20)),
        ),
        TOLERATED,
    ),
    "wrong sum of the header": (lambda rng: _bad_sum(rng, b"IHDR"), UNREADABLE),
    "wrong sum of the data": (lambda rng: _bad_sum(rng, b"IDAT"), TOLERATED),
    "16-bit grey": (
        lambda rng: encoded(rng.integers(0, 2**16, (_SIDE, _SIDE), dtype=np.uint16), "png"),
        frozenset({USED}),
    ),
    "16-bit colours": (
        lambda rng: png(
            _SIDE, _SIDE, rows(rng.integers(0, 2**16, (_SIDE, _SIDE, 3)).astype(">u2")), depth=16
        ),
        frozenset({USED}),
    ),
    "floats": (lambda rng: encoded(rng.random((_SIDE, _SIDE), np.float32), "tiff"), MODE),
    "cmyk": (_cmyk, frozenset({USED})),
    "animated gif": (lambda rng: _animated(rng, "gif"), ANIMATED),
    "animated webp": (lambda rng: _animated(rng, "webp"), ANIMATED),
    "animated png": (lambda rng: _animated(rng, "png"), ANIMATED),
    "pages of a tiff": (lambda rng: _animated(rng, "tiff"), ANIMATED),
    "one pixel": (
        lambda rng: encoded(pixels(rng, 8, 8)[:1, :1], "png"),
        frozenset({"picture_too_small"}),
    ),
    "narrow": (
        lambda rng: encoded(pixels(rng, 40, 640), "jpeg"),
        frozenset({"picture_too_narrow"}),
    ),
}
