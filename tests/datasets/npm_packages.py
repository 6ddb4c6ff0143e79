"""Writes small npm packages in the formats of the real ones, with drawings of the test."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import PIL.Image

from leon_jax.datasets.emoji.npm_designs import PACKAGES, package_folder

# What emojibase-data says of the cats, as in version 17.0.0.
CATS = {
    "en": [
        {
            "label": "grinning cat", "hexcode": "1F63A",
            "tags": ["animal", "cat", "face", "grinning", "mouth", "open", "smile", "smiling"],
        },
        {
            "label": "waving hand", "hexcode": "1F44B", "tags": ["hand", "hello", "ttyl", "wave"],
            "skins": [{"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB"}],
        },
    ],
    "de": [
        {"label": "grinsende Katze", "hexcode": "1F63A", "tags": ["gesicht", "katzengesicht"]},
    ],
}  # fmt: skip


def write(
    folder: pathlib.Path,
    noto: Mapping[str, str] | None = None,
    fluent: Mapping[str, str] | None = None,
    fluent3d: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Writes the packages into a folder and returns its path.

    Args:
      folder: the folder that npm would install into.
      noto, fluent: the body of an icon (the content of an SVG element) by code points, as in
        `chars.json`.
      fluent3d: the pixels of an image, uint8[256, 256, 4], by code points, as in file names.
    """
    for name, version in PACKAGES.items():
        package = package_folder(folder, name)
        package.mkdir(parents=True, exist_ok=True)
        write_json(package / "package.json", {"name": name, "version": version})
    for name, side, icons in (("noto", 128, noto), ("fluent-emoji-flat", 32, fluent)):
        package = package_folder(folder, f"@iconify-json/{name}")
        chars = {points: f"icon-{number}" for number, points in enumerate(icons or {})}
        bodies = {f"icon-{n}": {"body": body} for n, body in enumerate((icons or {}).values())}
        icon_set = {"prefix": name, "icons": bodies, "width": side, "height": side}
        write_json(package / "icons.json", icon_set)
        write_json(package / "chars.json", chars)
    assets = package_folder(folder, "@lobehub/fluent-emoji-3d") / "assets"
    assets.mkdir(exist_ok=True)
    for points, pixels in (fluent3d or {}).items():
        PIL.Image.fromarray(pixels).save(assets / f"{points}.webp", lossless=True)
    for language in ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "zh", "ru"):
        path = package_folder(folder, "emojibase-data") / language / "data.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, CATS.get(language, []))
    return str(folder)


def write_json(path: pathlib.Path, value: object) -> None:
    path.write_text(json.dumps(value))
