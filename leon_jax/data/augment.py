"""Random image augmentations on the host, at about 0.2 ms per image.

Zoom, shift, mirroring and blur are one resampling matrix per axis; all colour changes are one 3x3
matrix. Two augmentations move a drawing from one design towards another: *closing* removes thin
dark lines, and *outlining* adds dark lines where colours meet.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from leon_jax.config import UserError

BACKGROUND = 255  # white, the background of the drawings and the colour outside the image
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """A random square crop.

    Attributes:
      crop: the smallest side of the crop, as a share of the image's shorter side; above 0. The side
        is uniform between this and the shorter side, and 1 always takes the largest square.
      mirror: probability of swapping left and right.
      scenes: probability of a scene of several images instead of a crop
        (`leon_jax.data.scenes`).

    Raises:
      UserError: a value is out of range.
    """

    crop: float = 0.75
    mirror: float = 0.5
    scenes: float = 0.0

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("scenes",)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise UserError(f"crop is {self.crop}; it must be above 0 and at most 1")
        for name in ("mirror", "scenes"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Strengths of the random augmentations; all zeros, and `crop` 1, give the resized image.

    Attributes:
      crop: the smallest side of the random square crop, as a share of the image's shorter side. It
        comes first. 1 always takes the largest square, at a random place of a longer image.
      zoom: the image is scaled by exp(uniform(-zoom, zoom)).
      aspect: the ratio of height to width is multiplied by exp(uniform(-aspect, aspect)).
      shift: maximum shift of the centre in each direction, as a fraction of the side.
      mirror: probability of swapping left and right.
      blur: maximum standard deviation of the additional Gaussian blur, in output pixels.
      brightness: maximum change of colours in [0, 1], of either sign.
      contrast, saturation: each is multiplied by exp(uniform(-x, x)).
      hue: maximum rotation of the hue in degrees, in either direction.
      gray: probability of removing all colour.
      close: probability of removing thin dark lines.
      outline: probability of adding dark lines where colours meet.
    """

    crop: float = 1.0
    zoom: float = 0.2
    aspect: float = 0.1
    shift: float = 0.08
    mirror: float = 0.2
    blur: float = 0.7
    brightness: float = 0.05
    contrast: float = 0.25
    saturation: float = 0.4
    hue: float = 12.0
    gray: float = 0.05
    close: float = 0.3
    outline: float = 0.2

    def __post_init__(self) -> None:
        CropConfig(self.crop, self.mirror)

    @property
    def is_crop(self) -> bool:
        """Whether the crop and the mirroring are the only changes."""
        changes = dataclasses.asdict(self)
        return not any(changes[name] for name in changes if name not in ("crop", "mirror"))


def random_square(
    sides: tuple[int, int], crop: float, rng: np.random.Generator
) -> tuple[int, int, int]:
    """Returns the top, the left and the side of a random square in an image, in pixels.

    Args:
      sides: height and width of the image.
      crop: the smallest side of the square, as a share of the shorter side; in (0, 1].
      rng: source of all random numbers.
    """
    side = max(1, round(min(sides) * rng.uniform(crop, 1.0)))
    top, left = (int(rng.integers(0, length - side + 1)) for length in sides)
    return top, left, side


def random_crop(
    pixels: UInt8[np.ndarray, "h w 3"],
    size: int,
    config: CropConfig,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a random square of an image, resized (Lanczos) and mirrored at random.

    Args:
      pixels: the image, of any size.
      size: height and width of the result in pixels.
      config: the smallest square, and the probability of mirroring.
      rng: source of all random numbers.
    """
    top, left, side = random_square(pixels.shape[:2], config.crop, rng)
    image = PIL.Image.fromarray(pixels).crop((left, top, left + side, top + side))
    image = image.resize((size, size), PIL.Image.Resampling.LANCZOS)
    if rng.random() < config.mirror:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def augment(
    pixels: UInt8[np.ndarray, "h w 3"],
    size: int,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a random augmentation of an image.

    Args:
      pixels: the image, of any size.
      size: height and width of the result in pixels.
      config: the strengths of the augmentations.
      rng: source of all random numbers.
    """
    if config.is_crop:  # several times as fast
        return random_crop(pixels, size, CropConfig(config.crop, config.mirror), rng)
    top, left, side = random_square(pixels.shape[:2], config.crop, rng)
    pixels = pixels[top : top + side, left : left + side]
    chance = rng.random(3)
    if chance[0] < config.close:
        pixels = closing(pixels, int(rng.integers(1, 3)))
    elif chance[0] < config.close + config.outline:
        pixels = outlining(pixels, int(rng.integers(1, 3)), rng.uniform(0.3, 1.0))
    zoom, aspect, up, left, blur = rng.uniform(-1, 1, 5)
    spread = abs(blur) * config.blur
    scale, stretch = zoom * config.zoom, aspect * config.aspect / 2
    rows = _resampling(
        pixels.shape[0], size, np.exp(scale + stretch), up * config.shift, spread, False
    )
    flip = bool(chance[1] < config.mirror)
    columns = _resampling(
        pixels.shape[1], size, np.exp(scale - stretch), left * config.shift, spread, flip
    )
    view = _resample(pixels, rows, columns)
    colour, offset = _colour(config, rng, gray=bool(chance[2] < config.gray))
    return np.round(255 * np.clip(view @ colour + offset, 0, 1)).astype(np.uint8)


def plain(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> Float32[np.ndarray, "size size 3"]:
    """Returns the image resized to `size` x `size` with an area-like filter, RGB in [0, 1].

    Sums are in float64, so that the result does not depend on how a matrix product is blocked.
    """
    rows, columns = (_resampling(side, size).astype(np.float64) for side in pixels.shape[:2])
    return np.clip(_resample(pixels, rows, columns), 0, 1).astype(np.float32)


def closing(pixels: UInt8[np.ndarray, "h w 3"], radius: int) -> UInt8[np.ndarray, "h w 3"]:
    """Applies a grey-scale closing to each channel.

    It removes dark features thinner than 2 * radius + 1 pixels.
    """
    return _window(_window(pixels, radius, np.maximum), radius, np.minimum)


def outlining(
    pixels: UInt8[np.ndarray, "h w 3"], radius: int, strength: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Darkens edges, where colours differ within `radius` pixels (a morphological gradient).

    Args:
      pixels: the image.
      radius: radius of the edges in pixels.
      strength: in [0, 1]; 1 makes strong edges black.
    """
    high, low = _window(pixels, radius, np.maximum), _window(pixels, radius, np.minimum)
    edges = (high - low).max(-1, keepdims=True)
    return (pixels * (1 - strength * np.minimum(edges / np.float32(96), 1))).astype(np.uint8)


def _window(pixels: np.ndarray, radius: int, reduce: np.ufunc) -> np.ndarray:
    """Returns the maximum or minimum in a square window of side 2 * radius + 1 at each pixel."""
    for axis in (0, 1):
        for _ in range(radius):
            result = pixels.copy()
            after, before = [slice(None)] * 3, [slice(None)] * 3
            after[axis], before[axis] = slice(1, None), slice(None, -1)
            first, second = result[tuple(before)], result[tuple(after)]
            reduce(first, pixels[tuple(after)], out=first)
            reduce(second, pixels[tuple(before)], out=second)
            pixels = result
    return pixels


def _resampling(
    source: int,
    target: int,
    scale: float = 1.0,
    shift: float = 0.0,
    blur: float = 0.0,
    flip: bool = False,
) -> Float32[np.ndarray, "target source"]:
    """Returns the resampling matrix of one axis, with Gaussian weights.

    A row sums to 1 inside the image, and to less where its window reaches beyond the image.

    Args:
      source: side of the input in pixels.
      target: side of the output in pixels.
      scale: magnification; 1 fits the whole input into the output.
      shift: shift of the content, as a fraction of the side.
      blur: standard deviation of the additional blur, in output pixels.
      flip: whether to mirror the axis.
    """
    step = source / (target * scale)  # source pixels per output pixel
    centres = (np.arange(target, dtype=np.float32) + 0.5 - target / 2) * step
    centres = (centres[::-1] if flip else centres) + source * (0.5 - shift)
    # A deviation of 0.45 steps acts like an area filter without visible aliasing. The minimum of
    # 0.4 pixels makes magnification smooth.
    deviation = np.hypot(max(0.45 * step, 0.4), blur * step)
    positions = (np.arange(-source // 2, source + source // 2, dtype=np.float32) + 0.5)[None]
    weights = np.exp(-0.5 * np.square((positions - centres[:, None]) / deviation))
    # Products with denormal numbers take ten times as long.
    weights[weights < 1e-30] = 0
    weights /= weights.sum(1, keepdims=True) + 1e-12
    start = source // 2 + source % 2
    return weights[:, start : start + source].astype(np.float32)


def _resample(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Resamples both axes of an image and scales it to [0, 1].

    The matrices apply to the difference from the background, so that pixels outside the image get
    the background colour.
    """
    difference = (BACKGROUND - pixels.astype(rows.dtype)) / 255
    height, width, _ = difference.shape
    resized_rows = (rows @ difference.reshape(height, width * 3)).reshape(len(rows), width, 3)
    return BACKGROUND / 255 - np.matmul(columns[None], resized_rows)


def _colour(
    config: AugmentConfig, rng: np.random.Generator, gray: bool
) -> tuple[Float32[np.ndarray, "3 3"], Float32[np.ndarray, "3"]]:
    """Returns a random colour change as a matrix and an offset: `rgb @ matrix + offset`."""
    saturation, contrast, hue, brightness = rng.uniform(-1, 1, 4)
    to_gray = np.outer(LUMINANCE, np.ones(3, np.float32))
    amount = 0.0 if gray else np.exp(saturation * config.saturation)
    matrix = amount * np.eye(3, dtype=np.float32) + (1 - amount) * to_gray
    # Rodrigues' formula for a rotation about the gray axis (1, 1, 1)/sqrt(3), for row vectors.
    angle = np.deg2rad(hue * config.hue)
    cross = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], np.float32) / np.sqrt(3)
    axis = np.full((3, 3), 1 / 3, np.float32)
    rotation = np.cos(angle) * (np.eye(3) - axis) + axis + np.sin(angle) * cross
    gain = np.exp(contrast * config.contrast)
    matrix = (matrix @ rotation * gain).astype(np.float32)
    # White is the fixed point of a contrast change, so the background stays white.
    offset = 1 - gain + brightness * config.brightness
    return matrix, np.full(3, offset, np.float32)
