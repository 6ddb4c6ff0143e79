"""SVG drawings: rasterised without reading any file, and their titles."""

import base64
import gzip
import importlib.util
import io
import time

import numpy as np
import pytest

from leon_jax.data import image_files, svg_files
from leon_jax.data.image_error import ImageError

XMLNS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def svg(content, attributes='width="20" height="10"'):
    return f"<svg {XMLNS} {attributes}>{content}</svg>".encode()


RED = svg('<rect width="10" height="10" fill="red"/>')
# Inkscape writes sizes in points; a point is 4/3 pixels.
POINTS = svg('<rect width="20" height="20" fill="red"/>', 'width="30pt" height="15pt"')


def decode(data):
    return image_files.decode(io.BytesIO(data), "cat.svg")


@pytest.mark.parametrize(
    "data",
    [
        RED,
        gzip.compress(RED),
        b"\xef\xbb\xbf" + RED,
        b"<?xml version='1.0'?>\n<!-- cat -->" + RED,
        POINTS,
    ],
)
def test_a_drawing_is_rasterised_on_white(data):
    image = decode(data)
    assert image.size == (svg_files.SIDE, svg_files.SIDE // 2)
    assert image.getpixel((10, 10)) == (255, 0, 0)
    assert image.getpixel((svg_files.SIDE - 10, 10)) == (255, 255, 255)


WORK = (
    '<metadata xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/'
    'dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/"><rdf:RDF><cc:Work><dc:title>{}'
    "</dc:title><dc:creator><cc:Agent><dc:title>A. Person</dc:title></cc:Agent></dc:creator>"
    "<dc:description>{}</dc:description></cc:Work></rdf:RDF></metadata>"
)


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ("<title> a\n cat </title><desc>drawn</desc>", "a cat"),
        ("<desc>a cat</desc>", "a cat"),
        ("<title/><desc>a cat</desc>", "a cat"),
        ("<g><title>a part</title></g>", ""),
        (WORK.format("a cat", "of someone"), "a cat"),
        (WORK.format("", "a cat"), "a cat"),
        (WORK.format("", ""), ""),
        ("<title>first</title><title>second</title>", "first"),
        ("<title>unclosed", ""),
    ],
)
def test_the_caption_is_the_title_or_the_description(content, caption):
    assert svg_files.caption(svg(content)) == caption


def test_other_files_have_no_caption():
    page = b"<html><title>a page</title><body><svg><title>a</title></svg></body></html>"
    for data in (b"", b"\x89PNG", page, b"<rss><title>a</title></rss>", b"\x1f\x8bnonsense"):
        assert svg_files.caption(data) == ""


def test_no_file_is_read(tmp_path):
    """Neither directly, nor by an entity, nor from a drawing within the drawing."""
    secret = tmp_path / "secret.svg"
    secret.write_bytes(RED)
    image = '<image xlink:href="{}" width="10" height="10"/>'
    for name in (secret, f"file://{secret}", "secret.svg", "https://example.org/a.png"):
        with pytest.raises(ImageError, match=r"cat\.svg is an SVG drawing that needs the file"):
            decode(svg(image.format(name)))
    inner = base64.b64encode(svg(image.format(secret))).decode()
    with pytest.raises(ImageError, match="shows nothing"):
        decode(svg(image.format(f"data:image/svg+xml;base64,{inner}")))
    entity = f'<!DOCTYPE svg [<!ENTITY a SYSTEM "{secret}">]>'.encode()
    with pytest.raises(ImageError, match="damaged SVG drawing: undefined entity"):
        decode(entity + svg("<title>&a;</title>"))
    embedded = base64.b64encode(_png()).decode()
    assert decode(svg(image.format(f"data:image/png;base64,{embedded}"))).getextrema()[1][0] == 0


def _png():
    buffer = io.BytesIO()
    image_files.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


LAUGHS = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 50}">' for n in range(1, 7))
USES = "".join(f'<g id="u{n}">{f"""<use xlink:href="#u{n - 1}"/>""" * 20}</g>' for n in range(1, 9))


@pytest.mark.parametrize(
    "data",
    [
        svg(""),
        svg("", 'width="0" height="9"'),
        RED[:-3],
        svg("<g>" * 900 + '<rect width="5" height="5"/>' + "</g>" * 900),
        svg("<g>" * 100_000 + "</g>" * 100_000),
        f'<!DOCTYPE svg [<!ENTITY e0 "{"x" * 1000}">{LAUGHS}]>'.encode() + svg("&e6;"),
        svg(f'<defs><rect id="u0" width="5" height="5"/>{USES}</defs><use xlink:href="#u8"/>'),
        gzip.compress(svg(" " * (svg_files.MAX_BYTES + 1))),
    ],
    ids=["empty", "no size", "cut", "deep", "very deep", "entities", "uses", "large"],
)
def test_hostile_drawings_are_refused(data):
    """Some of them crash the library that draws."""
    with pytest.raises(ImageError, match=r"^cat\.svg is a") as error:
        decode(data)
    assert error.value.reason == "picture_unreadable"


def test_drawing_takes_bounded_time(monkeypatch):
    monkeypatch.setattr(svg_files, "_SECONDS", 1)
    endless = (
        '<filter id="f"><feTurbulence numOctaves="100000000" baseFrequency="0.1"/></filter>'
        '<rect width="20" height="10" filter="url(#f)"/>'
    )
    start = time.monotonic()
    with pytest.raises(ImageError, match="cannot be drawn"):
        decode(svg(endless))
    assert time.monotonic() - start < 30


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"resvg-py; run: pip install 'leon_jax\[images\]'"):
        decode(RED)
