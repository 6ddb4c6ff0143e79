"""Random views of a drawing, cheap enough for the host: about 0.2 ms a picture.

Zoom, shift, mirror and blur are one resampling matrix an axis; all colour changes are one 3x3
matrix. Two views carry a drawing from one design family towards another: *closing* wipes thin dark
lines out and *outlining* draws dark lines where colours meet.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

BACKGROUND = 255  # what lies outside the picture, and the paper that the drawings stand on
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How strong the random views are; all zeros give the plain resized picture.

    Attributes:
      zoom: the picture's scale is exp(uniform(-zoom, zoom)).
      aspect: height over width is further changed by exp(uniform(-aspect, aspect)).
      shift: the centre moves by up to this fraction of the side, each way.
      mirror: probability of swapping left and right.
      blur: the largest extra Gaussian blur, in output pixels (standard deviation).
      brightness: added to [0, 1] colours, up to this, either sign.
      contrast, saturation: multiplied by exp(uniform(-x, x)).
      hue: rotation of the colour wheel, up to this many degrees either way.
      gray: probability of dropping all colour.
      close: probability of wiping thin dark lines out.
      outline: probability of drawing dark lines where colours meet.
    """

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


def augment(
    pixels: UInt8[np.ndarray, "h w 3"],
    size: int,
    config: AugmentConfig,
    rng: np.random.Generator,
    mirror: bool = True,
) -> Float32[np.ndarray, "size size 3"]:
    """A random view of `pixels`, `size` on each side, RGB in [0, 1].

    `mirror=False` forbids mirroring, for pictures that hold writing or tell left from right.
    """
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
    flip = mirror and chance[1] < config.mirror
    columns = _resampling(
        pixels.shape[1], size, np.exp(scale - stretch), left * config.shift, spread, flip
    )
    view = _resample(pixels, rows, columns)
    colour, offset = _colour(config, rng, gray=bool(chance[2] < config.gray))
    return np.clip(view @ colour + offset, 0, 1)


def plain(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> Float32[np.ndarray, "size size 3"]:
    """The picture resized to `size` on each side with an area-like filter, RGB in [0, 1].

    Summed in float64, so that the result does not depend on how a matrix product is cut up.
    """
    rows, columns = (_resampling(side, size).astype(np.float64) for side in pixels.shape[:2])
    return np.clip(_resample(pixels, rows, columns), 0, 1).astype(np.float32)


def closing(pixels: UInt8[np.ndarray, "h w 3"], radius: int) -> UInt8[np.ndarray, "h w 3"]:
    """Grey-scale closing a channel: dark features thinner than 2 * radius + 1 pixels vanish."""
    return _spread(_spread(pixels, radius, np.maximum), radius, np.minimum)


def outlining(
    pixels: UInt8[np.ndarray, "h w 3"], radius: int, strength: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Darkens places where brightness changes within `radius` pixels (a morphological gradient)."""
    high, low = _spread(pixels, radius, np.maximum), _spread(pixels, radius, np.minimum)
    edges = (high - low).max(-1, keepdims=True)
    return (pixels * (1 - strength * np.minimum(edges / np.float32(96), 1))).astype(np.uint8)


def _spread(pixels: np.ndarray, radius: int, best: np.ufunc) -> np.ndarray:
    """The best value within a square of side 2 * radius + 1, one axis at a time."""
    for axis in (0, 1):
        for _ in range(radius):
            result = pixels.copy()
            ahead, behind = [slice(None)] * 3, [slice(None)] * 3
            ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
            one, other = result[tuple(behind)], result[tuple(ahead)]
            best(one, pixels[tuple(ahead)], out=one)
            best(other, pixels[tuple(behind)], out=other)
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
    """One axis of the view as a matrix of Gaussian weights.

    Rows sum to 1 inside the picture and to less where the window reaches beyond it.
    """
    step = source / (target * scale)  # source pixels an output pixel
    places = (np.arange(target, dtype=np.float32) + 0.5 - target / 2) * step
    places = (places[::-1] if flip else places) + source * (0.5 - shift)
    # 0.45 of a step stands in for an area filter without visible aliasing; the floor keeps
    # magnification smooth.
    deviation = np.hypot(max(0.45 * step, 0.4), blur * step)
    distance = (np.arange(-source // 2, source + source // 2, dtype=np.float32) + 0.5)[None]
    weights = np.exp(-0.5 * np.square((distance - places[:, None]) / deviation))
    weights /= weights.sum(1, keepdims=True) + 1e-12
    start = source // 2 + source % 2
    return weights[:, start : start + source].astype(np.float32)


def _resample(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Applies both matrices to the picture's distance from the background, scaled to [0, 1]."""
    ink = (BACKGROUND - pixels.astype(rows.dtype)) / 255
    height, width, _ = ink.shape
    half = (rows @ ink.reshape(height, width * 3)).reshape(len(rows), width, 3)
    return BACKGROUND / 255 - np.matmul(columns[None], half)


def _colour(
    config: AugmentConfig, rng: np.random.Generator, gray: bool
) -> tuple[Float32[np.ndarray, "3 3"], Float32[np.ndarray, "3"]]:
    """A random colour change, `rgb @ matrix + offset`."""
    saturation, contrast, hue, brightness = rng.uniform(-1, 1, 4)
    to_gray = np.outer(LUMINANCE, np.ones(3, np.float32))
    amount = 0.0 if gray else np.exp(saturation * config.saturation)
    matrix = amount * np.eye(3, dtype=np.float32) + (1 - amount) * to_gray
    # Rotation about the gray axis (1, 1, 1)/sqrt(3) (Rodrigues' formula), written for row vectors.
    angle = np.deg2rad(hue * config.hue)
    cross = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], np.float32) / np.sqrt(3)
    axis = np.full((3, 3), 1 / 3, np.float32)
    rotation = np.cos(angle) * (np.eye(3) - axis) + axis + np.sin(angle) * cross
    gain = np.exp(contrast * config.contrast)
    matrix = (matrix @ rotation * gain).astype(np.float32)
    # Contrast pivots about white, so the paper stays white.
    offset = 1 - gain + brightness * config.brightness
    return matrix, np.full(3, offset, np.float32)
