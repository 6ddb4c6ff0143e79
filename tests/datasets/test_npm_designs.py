"""The designs in npm packages: which concepts they have, and how they are drawn."""

import json

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.datasets.emoji import npm_designs
from leon_jax.datasets.emoji.npm_designs import (
    FLUENT,
    FLUENT_3D,
    NOTO,
    NPM_DESIGNS,
    concepts,
    render,
)
from tests.datasets import npm_packages

LEFT_HALF = '<path fill="#f00" d="M0 0h{half}v{side}H0z"/>'
WHITE, RED = [255, 255, 255], [255, 0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[:128] = (0, 0, 255, 255)
    pixels[128:192] = (0, 0, 0, 128)
    return npm_packages.write(
        tmp_path_factory.mktemp("npm"),
        noto={"1f431": LEFT_HALF.format(half=64, side=128), "0031-20e3": ""},
        fluent={"1f431": LEFT_HALF.format(half=16, side=32), "1f44b-1f3fb": ""},
        fluent3d={"2764-fe0f": pixels, "1f3f4-e0067_e0062_e007f": pixels},
    )


def test_concepts_are_code_points_without_the_variation_selector(folder):
    assert concepts(folder, NOTO) == {"1F431", "0031-20E3"}
    assert concepts(folder, FLUENT) == {"1F431", "1F44B-1F3FB"}
    assert concepts(folder, FLUENT_3D) == {"2764", "1F3F4-E0067-E0062-E007F"}


@pytest.mark.parametrize("design", [NOTO, FLUENT], ids=lambda design: design.name)
def test_an_icon_fills_the_image_on_white(folder, design):
    pixels = render(folder, design, "1F431")
    assert pixels.shape == (256, 256, 3) and pixels.dtype == np.uint8
    assert (pixels[:, :127] == RED).all() and (pixels[:, 129:] == WHITE).all()
    assert render(folder, design, "1F431", 64).shape == (64, 64, 3)


def test_an_icon_has_its_own_origin_and_sides(tmp_path):
    """The box of the icon begins at 10, 20 and is twice as wide as high; it is all red."""
    folder = npm_packages.write(tmp_path, noto={"1f431": ""})
    path = npm_designs.package_folder(folder, NOTO.package) / "icons.json"
    icon_set = json.loads(path.read_text())
    body = '<path fill="#f00" d="M10 20h40v20H10z"/>'
    icon_set["icons"]["icon-0"] = {"body": body, "left": 10, "top": 20, "width": 40, "height": 20}
    npm_packages.write_json(path, icon_set)
    pixels = render(folder, NOTO, "1F431")
    assert (pixels[65:191] == RED).all()
    assert (pixels[:63] == WHITE).all() and (pixels[193:] == WHITE).all()


def test_transparency_is_blended_with_white(folder):
    pixels = render(folder, FLUENT_3D, "2764")
    assert (pixels[:128] == [0, 0, 255]).all() and (pixels[192:] == WHITE).all()
    assert np.abs(pixels[128:192].astype(int) - 127).max() <= 1


def test_a_concept_that_a_design_lacks_raises_an_error(folder):
    with pytest.raises(KeyError):
        render(folder, NOTO, "2764")


def test_missing_packages_raise_an_error_with_the_command(tmp_path):
    with pytest.raises(UserError, match=r"noto/package\.json is missing; .*npm install --prefix"):
        npm_designs.check_packages(tmp_path)
    folder = npm_packages.write(tmp_path)
    npm_designs.check_packages(folder)
    package = npm_designs.package_folder(folder, NOTO.package) / "package.json"
    npm_packages.write_json(package, {"version": "1.0.0"})
    with pytest.raises(
        UserError, match=r"noto 1\.0\.0, but .* 1\.2\.9; run: npm install .*@1\.2\.9"
    ):
        npm_designs.check_packages(folder)
    package.write_text("{")
    with pytest.raises(UserError, match=r"package\.json cannot be read; run: npm install"):
        npm_designs.check_packages(folder)


def test_missing_images_raise_an_error(tmp_path):
    with pytest.raises(UserError, match=r"assets is missing; run: npm install"):
        concepts(tmp_path, FLUENT_3D)


def test_every_credit_line_names_the_licence():
    for design in NPM_DESIGNS:
        assert design.licence in design.attribution and "https://" in design.attribution
