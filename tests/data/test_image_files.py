"""Image files of every format and colour mode: what is converted, and what is refused."""

import io
import struct
import sys

import numpy as np
import PIL.Image
import pillow_heif
import pillow_jxl  # noqa: F401  (it registers JPEG XL with Pillow)
import pytest
from PIL import ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from leon_jax.data import image_files, image_formats
from leon_jax.data.image_error import ImageError
from leon_jax.data.image_formats import JpegXlHeader
from leon_jax.generate.inputs import image_part
from tests.data.hostile_images import chunk, png, rows

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
SMIN, SMAX, PHOTOMETRIC = 340, 341, 262

pillow_heif.register_heif_opener()


def encoded(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    return np.asarray(image_files.decode(io.BytesIO(data), "x"))


def halves(width=64, height=48):
    """Red on the left, blue on the right."""
    image = PIL.Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height))
    return image


def rotated():
    """EXIF data: viewers rotate the image by 90 degrees clockwise."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def tiff_range(low, high, **tags):
    directory = ImageFileDirectory_v2()
    for tag, value in ((SMIN, low), (SMAX, high)):
        directory.tagtype[tag] = 12  # double
        directory[tag] = value
    return directory


class TestDepth:
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "JXL"])
    def test_16_bit_grey_is_divided_by_257(self, kind):
        options = {"lossless": True} if kind == "JXL" else {}
        result = pixels(encoded(GREY.astype(np.uint16) * 257, kind, **options))
        assert (result == GREY[..., None]).all()

    def test_every_16_bit_value_is_rounded_and_none_is_clipped(self):
        values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
        result = pixels(encoded(values))[..., 0]
        assert (result == np.rint(values / 257)).all()

    def test_other_maxima_and_a_white_zero_are_read(self):
        white_is_zero = encoded(GREY.astype(np.uint16) * 257, "TIFF", tiffinfo={PHOTOMETRIC: 0})
        assert (pixels(white_is_zero)[..., 0] == 255 - GREY).all()
        grey = b"P5 4 1 1000\n" + np.array([0, 500, 1000, 250], ">u2").tobytes()
        assert pixels(grey)[0, :, 0].tolist() == [0, 128, 255, 64]

    def test_a_transparent_grey_of_16_bits_is_white(self):
        data = rows(np.array([[0, 514, 65535]], ">u2"))
        transparent = chunk(b"tRNS", struct.pack(">H", 514))
        result = pixels(png(3, 1, data, depth=16, colour=0, extra=transparent))
        assert result[0, :, 0].tolist() == [0, 255, 255]

    def test_16_bit_colours_keep_their_upper_bits(self):
        colours = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
        data = rows((colours.astype(np.uint16) * 257).astype(">u2"))
        assert (pixels(png(16, 16, data, depth=16)) == colours).all()
        ppm = b"P6 16 16 65535\n" + (colours.astype(np.uint16) * 257).astype(">u2").tobytes()
        assert (pixels(ppm) == colours).all()

    def test_floats_are_divided_by_their_stated_range_or_refused(self):
        values = np.linspace(-1, 3, 256, dtype=np.float32).reshape(16, 16)
        stated = encoded(values, "TIFF", tiffinfo=tiff_range(-1.0, 3.0))
        assert (pixels(stated)[..., 0] == GREY).all()
        for data, message in (
            (encoded(values, "TIFF"), "x has floats and states no range"),
            (
                encoded(values, "TIFF", tiffinfo=tiff_range(-1.0, 2.0)),
                "outside of its stated range",
            ),
            (encoded(values * np.nan, "TIFF", tiffinfo=tiff_range(-1.0, 2.0)), "outside of its"),
            (encoded(values, "TIFF", tiffinfo=tiff_range(2.0, 2.0)), "states no range"),
            (encoded(values.astype(np.int32), "TIFF"), "x has 32-bit numbers and states no range"),
        ):
            with pytest.raises(ImageError, match=message) as error:
                pixels(data)
            assert error.value.reason == "picture_mode"

    def test_an_image_in_memory_is_treated_like_a_file(self):
        part = image_part(PIL.Image.fromarray(GREY.astype(np.uint16) * 257))
        assert (part.pixels[..., 0] == GREY).all()
        with pytest.raises(ImageError, match="the image has floats and states no range"):
            image_part(PIL.Image.new("F", (4, 4)))


def cmyk_profile(lab):
    """An ICC profile of a printer: colours look like `lab` (8-bit L, a, b), black is black."""
    curve = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix
    # The corners of the table: no ink is white, black is black whatever else is printed.
    corners = [(255, 128, 128), (0, 128, 128), *[lab, (0, 128, 128)] * 7]
    table += curve * 4 + b"".join(map(bytes, corners)) + curve * 3
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"A2B0": table,
    }
    listing, contents, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        listing += name + struct.pack(">II", start + len(contents), len(data))
        contents += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(contents), b"", 0x02400000, b"prtr", b"CMYK",
                         b"Lab ")  # fmt: skip
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + listing + contents


class TestColours:
    def test_cmyk_is_converted_through_its_profile(self):
        cyan = PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0))
        lab = (150, 168, 100)
        result = pixels(encoded(cyan, "TIFF", icc_profile=cmyk_profile(lab)))
        expected = ImageCms.profileToProfile(
            PIL.Image.new("LAB", (8, 8), lab), ImageCms.createProfile("LAB"),
            ImageCms.createProfile("sRGB"), outputMode="RGB",
        )  # fmt: skip
        assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 2
        assert np.ptp(result[0, 0]) > 50, "the profile was ignored"

    def test_cmyk_without_a_profile_is_converted_by_its_inverse(self):
        for kind in ("TIFF", "JPEG"):
            data = encoded(PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0)), kind)
            assert np.abs(pixels(data)[0, 0].astype(int) - (0, 255, 255)).max() <= 2

    def test_a_profile_that_does_not_fit_is_refused(self):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for profile in (srgb, b"nonsense"):
            data = encoded(PIL.Image.new("CMYK", (8, 8)), "TIFF", icc_profile=profile)
            with pytest.raises(
                ImageError, match="a colour profile that does not fit its mode CMYK"
            ):
                pixels(data)

    def test_lab_is_converted(self):
        result = pixels(encoded(PIL.Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF"))
        assert result.min() >= 253


class TestFormats:
    def test_the_first_picture_of_a_camera_is_taken(self):
        data = encoded(halves(), "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (8, 6))])
        assert PIL.Image.open(io.BytesIO(data)).n_frames == 2
        assert pixels(data).shape == (48, 64, 3)

    def test_a_tiff_with_a_smaller_copy_is_read_and_one_with_pages_is_not(self):
        buffer = io.BytesIO()
        copy = PIL.Image.new("RGB", (8, 6))
        copy.encoderinfo = {"tiffinfo": {254: 1}}
        halves().save(buffer, "TIFF", save_all=True, append_images=[copy])
        assert pixels(buffer.getvalue()).shape == (48, 64, 3)
        pages = encoded(halves(), "TIFF", save_all=True, append_images=[halves()])
        with pytest.raises(ImageError, match="is an animation or has several pages") as error:
            pixels(pages)
        assert error.value.reason == "picture_animated"

    @pytest.mark.parametrize("kind", ["AVIF", "HEIF", "JXL"])
    def test_formats_of_phones_and_of_the_web_are_read(self, kind):
        result = pixels(encoded(halves(), kind))
        assert result.shape == (48, 64, 3)
        assert np.abs(result[24, 8].astype(int) - (255, 0, 0)).max() < 12
        assert np.abs(result[24, 56].astype(int) - (0, 0, 255)).max() < 12

    @pytest.mark.parametrize("kind", ["AVIF", "HEIF", "JPEG", "PNG"])
    def test_the_orientation_is_applied_once(self, kind):
        result = pixels(encoded(halves(), kind, exif=rotated()))
        assert result.shape == (64, 48, 3)
        assert result[8, 24, 0] > 240 and result[56, 24, 2] > 240

    def test_the_orientation_of_jpeg_xl_is_that_of_its_decoder(self, tmp_path):
        """Its pixels are upright, whatever the EXIF data says, unless it restores a JPEG."""
        for container in (False, True):
            data = encoded(halves(), "JXL", exif=rotated(), use_container=container)
            assert pixels(data).shape == (48, 64, 3)
        halves().save(tmp_path / "a.jpg", exif=rotated())
        restored = encoded(PIL.Image.open(tmp_path / "a.jpg"), "JXL", lossless_jpeg=True)
        assert pixels(restored).shape == (64, 48, 3)

    @pytest.mark.parametrize(
        "size", [(8, 8), (16, 8), (1000, 20), (20, 1000), (3000, 2000), (400, 300), (1280, 720)]
    )
    def test_the_size_of_jpeg_xl_is_read_before_it_is_decoded(self, size, monkeypatch):
        data = encoded(PIL.Image.new("RGB", size), "JXL", use_container=size[0] > size[1])
        assert image_formats.jpeg_xl_header(data) == JpegXlHeader(size, animated=False)
        monkeypatch.setattr(image_files, "MAX_SIDE", max(size) - 1)
        monkeypatch.setattr(PIL.Image, "open", lambda *args, **kwargs: pytest.fail("was opened"))
        with pytest.raises(ImageError, match=rf"x has {size[0]} x {size[1]} pixels"):
            pixels(data)

    def test_an_animation_in_jpeg_xl_is_refused(self):
        # small, height 8, ratio 1:1; not all_default, extra fields, no orientation, size or
        # preview, an animation; the lowest bit comes first
        bits = "1" + "00000" + "100" + "0" + "1" + "000" + "0" + "0" + "1"
        header = int(bits[::-1], 2).to_bytes(8, "little")
        with pytest.raises(ImageError, match="is an animation") as error:
            pixels(b"\xff\x0a" + header)
        assert error.value.reason == "picture_animated"

    def test_damaged_files_of_the_extras_are_refused(self):
        rng = np.random.default_rng(0)
        for kind in ("AVIF", "HEIF", "JXL"):
            data = encoded(halves(), kind)
            for _ in range(30):
                cut = bytearray(data[: rng.integers(12, len(data))])
                for position in rng.integers(12, len(cut) + 12, size=3):
                    if position < len(cut):
                        cut[position] ^= int(rng.integers(1, 256))
                try:
                    pixels(bytes(cut))
                except ImageError as error:
                    assert error.reason in ("picture_unreadable", "picture_too_large"), error

    @pytest.mark.parametrize(
        ("kind", "module", "package"),
        [("HEIF", "pillow_heif", "pillow-heif"), ("JXL", "pillow_jxl", "pillow-jxl-plugin")],
    )
    def test_a_missing_package_is_named_with_its_extra(self, kind, module, package, monkeypatch):
        data = encoded(halves(), kind)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImageError, match=rf"{package}; run: pip install 'leon_jax\[images\]'"):
            pixels(data)
