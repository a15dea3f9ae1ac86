"""Decoding: every mode and format gives the RGB square it should."""

from __future__ import annotations

import io
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers_cases import for_every
from PIL import Image

from pipeline.data import decode as decode_module
from pipeline.data import decode_image, open_image
from pipeline.data.decode import decode_images, decode_sized
from pipeline.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def test_bytes_path_and_image_agree(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    path = tmp_path / "image.png"
    path.write_bytes(encode(image))
    for source in (
        image,
        path,
        str(path),
        encode(image),
        encode(image, "BMP"),
        encode(image, "WEBP", lossless=True),
    ):
        decoded = decode_image(source, 8)
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, RGB.transpose(2, 0, 1))


def test_resize_is_antialiased_bicubic_to_a_square() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 90, 3), np.uint8))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(decode_image(encode(image), 16), expected)
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (64, 32)))
    assert (
        np.abs(decode_image(encode(stripes), 8).astype(int)[:, :, 1:-1] - 127).max() < 24
    )  # fine stripes average out; they do not alias


def test_grey_one_bit_and_alpha() -> None:
    grey = Image.fromarray(RGB[:, :, 0])
    assert np.array_equal(decode_image(encode(grey), 8), np.stack([RGB[:, :, 0]] * 3))
    assert set(np.unique(decode_image(encode(grey.convert("1")), 8))) == {0, 255}
    alpha = Image.fromarray(RGB).convert("RGBA")
    alpha.putalpha(9)
    assert np.array_equal(decode_image(encode(alpha), 8), RGB.transpose(2, 0, 1))
    assert np.array_equal(decode_image(encode(grey.convert("LA")), 8)[0], RGB[:, :, 0])


def test_palette_with_and_without_transparency() -> None:
    palette = Image.fromarray(RGB).quantize(64)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(encode(palette), 8), expected)
    assert np.array_equal(decode_image(encode(palette, transparency=bytes(range(64))), 8), expected)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    deep = np.array([[0, 257, 65535, 32768]] * 4, np.uint16)
    decoded = decode_image(encode(Image.fromarray(deep)), 4)
    assert decoded[0, 0].tolist() == [0, 1, 255, 128]


def test_cmyk_jpeg() -> None:
    decoded = decode_image(
        encode(Image.new("RGB", (8, 8), (200, 30, 30)).convert("CMYK"), "JPEG"), 8
    )
    assert np.abs(decoded.mean(axis=(1, 2)) - [200, 30, 30]).max() < 12


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_keeps_its_own_size(name: str, orientation: int) -> None:
    """Though a JPEG is decoded at a part of it, and turned on its side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.new("RGB", (203, 131)), name, exif=exif)
    square, size = decode_sized(content, 16)
    assert square.shape == (3, 16, 16)
    width, height = open_image(content).size
    assert size == (height, width) == ((131, 203) if orientation < 5 else (203, 131))


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    decoded = decode_image(encode(Image.fromarray(pixels), "JPEG", exif=exif, quality=100), 16)
    assert decoded[0, :8].mean() < 20
    assert decoded[0, 8:].mean() > 235


@for_every("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_images_are_refused(kind: str) -> None:
    content = encode(
        Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)), kind
    )
    for cut in (0, 1, 10, len(content) // 3, len(content) * 2 // 3):
        with pytest.raises(DataError, match=r"s\.tar: 7: cannot be decoded"):
            decode_image(content[:cut], 8, "s.tar: 7")


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX"])
def test_other_formats_are_not_opened(kind: str) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(encode(Image.fromarray(RGB), kind), 8)


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(DataError, match="pixels"):
        decode_image(content, 8)


def test_missing_and_float_images() -> None:
    with pytest.raises(DataError, match=r"none\.png: no such image"):
        decode_image("none.png", 8)
    with pytest.raises(DataError, match="floating point"):
        decode_image(Image.fromarray(np.zeros((4, 4), np.float32)), 8)


@for_every("size_px", [8, 12, 40, 100])
@for_every("kind", ["PNG", "JPEG"])
def test_images_decoded_together_are_the_same_as_alone(kind: str, size_px: int) -> None:
    rng = np.random.default_rng(3)
    sizes = [(9, 12), (12, 9), (9, 12), (150, 90), (12, 12), (1, 9), (9, 12), (12, 12)]
    contents = [
        encode(Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)), kind) for size in sizes
    ]
    squares = np.zeros((len(contents), 3, size_px, size_px), np.uint8)
    decode_images(squares, ((str(row), content) for row, content in enumerate(contents)))
    alone = np.stack([decode_image(content, size_px) for content in contents])
    assert np.array_equal(squares, alone)


def test_a_fault_names_its_image_among_others() -> None:
    whole = encode(Image.fromarray(RGB))
    contents = [("a.png", whole), ("b.png", whole[:40]), ("c.png", whole)]
    with pytest.raises(DataError, match=r"b\.png: cannot be decoded"):
        decode_images(np.zeros((3, 3, 8, 8), np.uint8), contents)


def test_of_large_images_one_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Image.Image]] = []
    find = decode_module._open

    def noted(content: bytes, least_px: int) -> tuple[Image.Image, tuple[int, int]]:
        assert not [image for image in opened if image() is not None]
        image, size = find(content, least_px)
        opened.append(weakref.ref(image))
        return image, size

    monkeypatch.setattr(decode_module, "_open", noted)
    large = encode(Image.new("RGB", (300, 300)))  # of one colour: in few bytes
    decode_images(np.zeros((3, 3, 8, 8), np.uint8), [("a", large), ("b", large), ("c", large)])
    assert len(opened) >= 3
