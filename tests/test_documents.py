"""Documents are checked, immutable values."""

import pickle

import numpy as np
import pytest

from leon_jax.documents import Document, Hole, Image, Provenance, Text, normalise_text


def picture(value=0):
    return np.full((4, 5, 3), value, np.uint8)


def test_equal_contents_are_equal_and_hash_equal():
    def make():
        return Document(
            (Text("a cat"), Image(picture(7), np.arange(6, dtype=np.int32).reshape(2, 3))),
            Provenance("k", "s", "CC0-1.0", ""),
        )

    assert make() == make()
    assert len({make(), make(), pickle.loads(pickle.dumps(make()))}) == 1


@pytest.mark.parametrize(
    "other",
    [
        Image(picture(8)),
        Image(picture(7), np.zeros((2, 2), np.int32)),
        Image(picture(7)[:, :4]),
        Image(codes=np.zeros((2, 2), np.int32)),
        Text("7"),
    ],
)
def test_different_contents_are_not_equal(other):
    assert Image(picture(7)) != other


def test_an_image_cannot_be_changed_from_outside():
    pixels = picture(1)
    image = Image(pixels)
    pixels[:] = 9
    assert image.pixels is not None and image.pixels.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0, 0] = 3


def test_codes_are_int32_whatever_integers_were_given():
    image = Image(codes=np.ones((2, 2), np.uint16))
    assert image.codes is not None and image.codes.dtype == np.int32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Text(3), TypeError, "takes a string, not int"),
        (lambda: Text("a\ud800"), ValueError, "lone surrogate at position 1"),
        (lambda: Image(), ValueError, "given neither"),
        (lambda: Image(picture().astype(np.float32)), TypeError, "uint8 in 0..255, not float32"),
        (lambda: Image(picture()[..., :1]), ValueError, r"\[height, width, 3\], not \[4, 5, 1\]"),
        (lambda: Image(codes=np.zeros(4, np.int32)), ValueError, r"\[rows, cols\], not \[4\]"),
        (lambda: Image(codes=np.zeros((2, 2))), TypeError, "must be integers, not float64"),
        (lambda: Image(codes=np.full((2, 2), -1)), ValueError, "the smallest is -1"),
        (lambda: Image(codes=np.full((2, 2), 2**31)), ValueError, "the largest is 2147483648"),
        (lambda: Hole("sound"), ValueError, "not with 'sound'"),
        (lambda: Provenance("", "s", "MIT", ""), ValueError, "provenance.key is ''"),
        (lambda: Document(()), ValueError, "at least one part"),
        (lambda: Document(Text("a")), TypeError, r"write Document\(\(part,\)\)"),
        (lambda: Document(("a",)), TypeError, r"parts\[0\] is str"),
        (lambda: Document((Text("a"),), "here"), TypeError, "provenance is str"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_holes_are_found_and_replaced():
    document = Document((Hole("text"), Text("and"), Hole("image")))
    assert document.holes == (0, 2)
    filled = document.replace(0, Text("this"))
    assert filled.parts == (Text("this"), Text("and"), Hole("image"))
    assert document.holes == (0, 2)


def test_a_document_is_read_by_its_text_pixels_and_codes():
    pixels = np.zeros((2, 3, 3), np.uint8)
    codes = np.array([[1, 2]], np.int32)
    document = Document((Text("a"), Image(codes=codes), Text("b"), Image(pixels=pixels)))
    assert document.text == "a b"
    np.testing.assert_array_equal(document.pixels, pixels)
    np.testing.assert_array_equal(document.codes, codes)
    empty = Document((Hole("text"),))
    assert empty.text == ""
    with pytest.raises(ValueError, match="no picture with pixels"):
        _ = empty.pixels
    with pytest.raises(ValueError, match="no picture with codes"):
        _ = empty.codes


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a grey cat", "a grey cat"),
        ("  a\tgrey\r\n cat\u00a0\u2028", "a grey cat"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u1112\u1161\u11ab\u3000\ud55c", "\ud55c \ud55c"),
        # Joiners and what only looks alike stay: NFC changes no meaning.
        ("\U0001f468\u200d\U0001f680 \ufb01", "\U0001f468\u200d\U0001f680 \ufb01"),
        (" \n", ""),
    ],
)
def test_one_text_has_one_spelling(text, normal):
    assert normalise_text(text) == normal == normalise_text(normal)
