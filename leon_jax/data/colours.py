"""Converts images of every colour mode to 8-bit sRGB. No value is ever clipped.

- 8-bit RGB, grey and palettes stay as they are, with transparency composited on white.
- Grey of 12 or 16 bits is divided by the largest number of the format (65,535 = 257 * 255).
- Of 16-bit RGB Pillow reads the upper 8 bits.
- 32-bit numbers and floats are divided by the range that the file states, or refused.
- CMYK and LAB are converted through the embedded ICC profile; CMYK without one by its inverse.
"""

import io
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageCms

from leon_jax.data.image_error import ImageError

# Modes that Pillow converts to RGB without loss of meaning.
_DIRECT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV")
_UINT16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# Tags of TIFF: bits of a sample, meaning of zero, and the smallest and largest sample.
_BITS, _PHOTOMETRIC = 258, 262
_RANGES = ((340, 341), (280, 281))  # SMinSampleValue and SMaxSampleValue, or the older tags
_WHITE_IS_ZERO = 0


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Returns a copy of an image in 8-bit sRGB, mode RGB, with transparency on white.

    Args:
      image: the loaded image.
      name: name of the image in error messages.

    Raises:
      ImageError: the colours cannot be converted without a guess. Its reason is "picture_mode".
    """
    mode = image.mode
    if mode in _UINT16_MODES:
        return _on_white(_from_uint16(image), image.info)
    if mode in ("I", "F"):
        return _grey(_from_numbers(image, name)).convert("RGB")
    if mode in ("CMYK", "LAB"):
        return _through_profile(image, name)
    if mode not in _DIRECT_MODES:
        raise ImageError(
            f"{name} has the colour mode {mode}; save it as 8-bit RGB or grey", "picture_mode"
        )
    return _on_white(image, image.info)


def _on_white(image: Image.Image, info: dict) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in info:
        return image.copy()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_uint16(image: Image.Image) -> Image.Image:
    """Converts unsigned numbers of 9 to 16 bits to grey; one value may be transparent."""
    values = np.asarray(image).astype(np.uint32)
    bits = int(_tag(image, _BITS) or 16)
    largest = 2**bits - 1 if 8 < bits <= 16 else 2**16 - 1
    grey = (values * 255 + largest // 2) // largest
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, 255, grey)
    image.info.pop("transparency", None)  # it is no value of the 8-bit image
    return _grey(grey.astype(np.uint8))


def _from_numbers(image: Image.Image, name: str) -> UInt8[np.ndarray, "height width"]:
    """Converts 32-bit integers or floats to grey, by the range that the file states."""
    values = np.asarray(image).astype(np.float64)
    stated = _stated_range(image)
    if stated is None:
        kind = "floats" if image.mode == "F" else "32-bit numbers"
        raise ImageError(
            f"{name} has {kind} and states no range (the TIFF tags SMinSampleValue and "
            "SMaxSampleValue); save it with 8 or 16 bits",
            "picture_mode",
        )
    low, high = stated
    if not (np.isfinite(values).all() and low <= values.min() and values.max() <= high):
        raise ImageError(
            f"{name} has values outside of its stated range {low:g} to {high:g}; save it with 8 "
            "or 16 bits",
            "picture_mode",
        )
    grey = _scaled(values, low, high)
    return 255 - grey if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _scaled(
    values: Num[np.ndarray, "height width"], low: float, high: float
) -> UInt8[np.ndarray, "height width"]:
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)


def _stated_range(image: Image.Image) -> tuple[float, float] | None:
    """Returns the smallest and largest value that the file states, or None."""
    if image.format == "PPM" and image.mode == "I":
        return 0, 2**16 - 1  # Pillow scales every larger maximum to it
    for pair in _RANGES:
        low, high = (_tag(image, tag) for tag in pair)
        if low is not None and high is not None and np.isfinite([low, high]).all() and low < high:
            return float(low), float(high)
    return None


def _tag(image: Image.Image, tag: int) -> float | None:
    """Returns the first value of a tag of a TIFF file, or None."""
    value: Any = getattr(image, "tag_v2", {}).get(tag)
    if isinstance(value, tuple):
        return value[0] if value else None
    return value


def _through_profile(image: Image.Image, name: str) -> Image.Image:
    """Converts CMYK or LAB to sRGB through the embedded profile, or without one by the formula."""
    embedded = image.info.get("icc_profile")
    try:
        if embedded:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        elif image.mode == "LAB":
            profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            return image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ImageError(
            f"{name} has a colour profile that does not fit its mode {image.mode}; save it as RGB",
            "picture_mode",
        ) from error
    assert converted is not None, "a conversion that is not in place returns an image"
    return converted


def _grey(values: UInt8[np.ndarray, "height width"]) -> Image.Image:
    return Image.fromarray(values)
