"""Converting raw records into documents: preprocessing of images, and rejected records."""

import io
import zlib

import numpy as np
import PIL.Image
import pytest

from leon_jax.data.sources.raw_record import REASONS, RawRecord, Reject, SourceConfig
from leon_jax.documents import Text
from leon_jax.prepare import record_reader
from leon_jax.prepare.config import PrepareConfig
from leon_jax.prepare.record_reader import ModelInputs, RecordReader

SOURCE = SourceConfig("jsonl", "cats", name="cats", licence="CC-BY-4.0", attribution="me")
NO_LICENCE = SourceConfig("jsonl", "cats", name="cats")


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width=50, height=40, mode="RGB"):
    rng = np.random.default_rng(0)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


GOOD = encoded(gradient())


def claiming(width, height):
    """A small PNG file whose header claims this size."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + GOOD[24:29]
    return GOOD[:12] + header + zlib.crc32(header).to_bytes(4, "big") + GOOD[33:]


def read(*parts, source=SOURCE, config=None, key="cat", **fields):
    settings = {"min_side": 8, "max_aspect": 2.0, "max_text": 100, "max_tokens": 40}
    config = PrepareConfig((source,), "t", "e", "x", **settings | (config or {}))
    models = ModelInputs(16, 4, preprocess=lambda pixels: pixels[:9, :9], count_tokens=len)
    reader = RecordReader(config, source, models)
    return reader(RawRecord(key, parts, **fields))


def test_an_image_is_rotated_composited_on_white_cropped_and_resized_for_every_model():
    left_red = PIL.Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    left_red.paste((255, 0, 0, 255), (0, 0, 20, 20))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # viewers rotate the image by 90 degrees clockwise
    result = read("a flag", encoded(left_red, exif=exif), config={"picture_side": 20})
    assert result.size == (20, 40)
    pixels = result.document.pixels
    assert pixels.shape == (20, 20, 3)
    assert (pixels[:10] == (255, 0, 0)).all() and (pixels[10:] == 255).all()
    assert [square.shape for square in result.squares] == [(16, 16, 3)]
    assert [array.shape for array in result.encoder_inputs] == [(9, 9, 3)]


def test_texts_are_normalised():
    """Texts are in NFC with single spaces, and tokens are counted after normalisation."""
    result = read("  cafe\u0301\t au\r\n\u3000lait\u00a0", GOOD, " \u1112\u1161\u11ab\n")
    texts = [part.text for part in result.document.parts if isinstance(part, Text)]
    assert texts == ["caf\u00e9 au lait", "\ud55c"]
    assert not isinstance(read("a" + " " * 60 + "b", GOOD), Reject), "three tokens of text"


def test_a_long_text_is_rejected_before_it_is_normalised(monkeypatch):
    """The time of normalisation is quadratic in the length of a run of combining marks."""
    monkeypatch.setattr(record_reader, "normalise_text", lambda text: pytest.fail("normalised"))
    assert read("e" + "\u0301\u0323" * 50, GOOD).reason == "text_too_long"


def test_the_provenance_of_a_record_overrides_that_of_the_source():
    default = read("a cat", GOOD).document.provenance
    assert (default.source, default.licence, default.attribution) == ("cats", "CC-BY-4.0", "me")
    stated = {"licence": "mit", "attribution": "you", "origin": "web", "language": "de"}
    provenance = read("a cat", GOOD, **stated).document.provenance
    assert (provenance.source, provenance.licence) == ("web", "MIT")
    assert (provenance.attribution, provenance.language) == ("you", "de")


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("no_picture", {"parts": ("a cat",)}),
        ("no_text", {"parts": (" ", GOOD)}),
        ("no_text", {"parts": (GOOD,)}),
        ("text_too_long", {"parts": ("a" * 101, GOOD)}),
        ("too_many_tokens", {"parts": ("a" * 34, GOOD)}),
        ("not_utf8", {"parts": ("a \ud800", GOOD)}),
        ("not_utf8", {"parts": ("a cat", GOOD), "attribution": "\udfff"}),
        ("missing_field", {"parts": ("a cat", GOOD), "key": ""}),
        ("licence_unknown", {"parts": ("a cat", GOOD), "licence": "?"}),
        ("licence_unknown", {"parts": ("a cat", GOOD), "source": NO_LICENCE}),
        ("licence_not_allowed", {"parts": ("a cat", GOOD), "licence": "CC-BY-NC-4.0"}),
        ("picture_unreadable", {"parts": ("a cat", b"")}),
        ("picture_unreadable", {"parts": ("a cat", GOOD[:-200])}),
        ("picture_unreadable", {"parts": ("a cat", b"<svg/>")}),
        ("picture_too_small", {"parts": ("a cat", encoded(gradient(7, 9)))}),
        ("picture_too_narrow", {"parts": ("a cat", encoded(gradient(81, 40)))}),
        ("picture_mode", {"parts": ("a cat", encoded(PIL.Image.new("F", (20, 20)), "TIFF"))}),
        (
            "picture_animated",
            {"parts": ("a cat", encoded(gradient(), "GIF", save_all=True,
                                        append_images=[PIL.Image.new("RGB", (50, 40))]))},
        ),
        ("picture_too_large", {"parts": ("a cat", claiming(60_000, 60_000))}),
        ("picture_too_large", {"parts": ("a cat", claiming(16_385, 20))}),
    ],
)  # fmt: skip
def test_invalid_records_are_rejected_with_a_reason(reason, arguments):
    parts = arguments.pop("parts")
    result = read(*parts, **arguments)
    assert isinstance(result, Reject) and result.reason == reason, result
    assert result.reason in REASONS and result.key == arguments.get("key", "cat")
    assert len(result.detail) <= 300


def test_a_document_with_exactly_the_maximum_number_of_ids_is_accepted():
    # </s> 32 letters <break> 4 codes <break> 0 letters </s>
    assert not isinstance(read("a" * 32, GOOD, ""), Reject)
    assert read("a" * 33, GOOD, "").reason == "too_many_tokens"


def test_rejects_of_a_source_pass_through():
    reject = Reject("shard 3", "unreadable_shard", "the tar ends early")
    config = PrepareConfig((SOURCE,), "t", "e", "x")
    assert RecordReader(config, SOURCE)(reject) is reject
