"""Documents are immutable values, and their arguments are checked."""

import pickle

import numpy as np
import pytest

from leon_jax.documents import Document, Hole, Image, Provenance, Text, normalise_text


def pixels_of(value=0):
    return np.full((4, 5, 3), value, np.uint8)


def test_equal_contents_are_equal_and_hash_equal():
    def make():
        return Document(
            (Text("a cat"), Image(pixels_of(7), np.arange(6, dtype=np.int32).reshape(2, 3))),
            Provenance("k", "s", "CC0-1.0", ""),
        )

    assert make() == make()
    assert len({make(), make(), pickle.loads(pickle.dumps(make()))}) == 1


@pytest.mark.parametrize(
    "other",
    [
        Image(pixels_of(8)),
        Image(pixels_of(7), np.zeros((2, 2), np.int32)),
        Image(pixels_of(7)[:, :4]),
        Image(codes=np.zeros((2, 2), np.int32)),
        Text("7"),
    ],
)
def test_different_contents_are_not_equal(other):
    assert Image(pixels_of(7)) != other


def test_an_image_cannot_be_changed_from_outside():
    pixels = pixels_of(1)
    image = Image(pixels)
    pixels[:] = 9
    assert image.pixels is not None and image.pixels.max() == 1
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0, 0] = 3


def test_codes_of_any_integer_type_become_int32():
    image = Image(codes=np.ones((2, 2), np.uint16))
    assert image.codes is not None and image.codes.dtype == np.int32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Text(3), TypeError, "takes a string, not int"),
        (lambda: Text("a\ud800"), ValueError, "lone surrogate at position 1"),
        (lambda: Image(), ValueError, "it has neither"),
        (lambda: Image(pixels_of().astype(np.float32)), TypeError, "uint8 in 0..255, not float32"),
        (lambda: Image(pixels_of()[..., :1]), ValueError, r"\[height, width, 3\], not \[4, 5, 1\]"),
        (lambda: Image(codes=np.zeros(4, np.int32)), ValueError, r"\[rows, cols\], not \[4\]"),
        (lambda: Image(codes=np.zeros((2, 2))), TypeError, "must be integers, not float64"),
        (lambda: Image(codes=np.full((2, 2), -1)), ValueError, "the smallest is -1"),
        (lambda: Image(codes=np.full((2, 2), 2**31)), ValueError, "the largest is 2147483648"),
        (lambda: Hole("image", [[1.7]]), ValueError, "whole numbers"),
        (lambda: Hole("sound"), ValueError, "not with 'sound'"),
        (lambda: Provenance("", "s", "MIT", ""), ValueError, "provenance.key is ''"),
        (lambda: Document(()), ValueError, "at least one part"),
        (lambda: Document(Text("a")), TypeError, r"write Document\(\(part,\)\)"),
        (lambda: Document(("a",)), TypeError, r"parts\[0\] is str"),
        (lambda: Document((Text("a"),), "here"), TypeError, "provenance is str"),
    ],
)
def test_wrong_arguments_are_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_holes_have_indices_and_can_be_replaced():
    document = Document((Hole("text"), Text("and"), Hole("image")))
    assert document.holes == (0, 2)
    filled = document.replace(0, Text("this"))
    assert filled.parts == (Text("this"), Text("and"), Hole("image"))
    assert document.holes == (0, 2)


def test_a_document_has_its_text_pixels_and_codes():
    pixels = np.zeros((2, 3, 3), np.uint8)
    codes = np.array([[1, 2]], np.int32)
    document = Document((Text("a"), Image(codes=codes), Text("b"), Image(pixels=pixels)))
    assert document.text == "a b"
    np.testing.assert_array_equal(document.pixels, pixels)
    np.testing.assert_array_equal(document.codes, codes)
    empty = Document((Hole("text"),))
    assert empty.text == ""
    with pytest.raises(ValueError, match="no image with pixels"):
        _ = empty.pixels
    with pytest.raises(ValueError, match="no image with codes"):
        _ = empty.codes


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a grey cat", "a grey cat"),
        ("  a\tgrey\r\n cat\u00a0\u2028", "a grey cat"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u1112\u1161\u11ab\u3000\ud55c", "\ud55c \ud55c"),
        # Joiners and compatibility characters stay, because NFC keeps the meaning.
        ("\U0001f468\u200d\U0001f680 \ufb01", "\U0001f468\u200d\U0001f680 \ufb01"),
        (" \n", ""),
    ],
)
def test_equal_texts_have_one_normal_form(text, normal):
    assert normalise_text(text) == normal == normalise_text(normal)
