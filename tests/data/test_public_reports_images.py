"""Conditions of image files that people reported for other tools; each is accepted, or refused by
name.
"""

from __future__ import annotations

import base64
import io
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers_images import encode, pixels_of, task_of, write_folders
from PIL import Image, ImageOps
from pydantic import ValidationError

from pipeline.data import Images, decode_image, prepare, read_shard
from pipeline.data.formats import IMAGE_EXTENSIONS, explain, extension_of, readable_formats
from pipeline.data.sources import encode_png
from pipeline.errors import DataError
from pipeline.kinds import kind_named
from pipeline.registry.pyfunc import PackModel
from pipeline.serving.predictor import Predictor
from pipeline.specs import Backbone, Input

# --- formats --------------------------------------------------------------------------------------

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "PPM": {}}


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEG", "AVIF", "GIF"])
def test_every_common_format_is_read_and_written_to_shards(kind: str, tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    image = Image.fromarray(np.kron(pixels_of(1, (2, 2)), np.ones((8, 8, 1), np.uint8)))
    content = encode(image, kind, **LOSSLESS.get(kind, {"quality": 95}))
    extension = extension_of(content)
    (tmp_path / "test" / "cat" / f"new.{str(extension).upper()}").write_bytes(content)
    index = prepare(task_of(data), tmp_path / "p")
    written = [
        image
        for shard in index.splits["test"]
        for _, image, _ in read_shard(str(tmp_path / "p" / shard.path))
    ]
    assert content in written
    difference = np.abs(
        decode_image(content, 16).astype(int) - np.asarray(image).transpose(2, 0, 1)
    )
    assert difference.max() == 0 if kind in LOSSLESS else difference.mean() < 12


@pytest.mark.parametrize("name", ["photo.jfif", "scan.TIF", "map.pgm", "old.jpeg"])
def test_less_common_extensions_are_images_too(name: str, tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    (tmp_path / "train" / "cat" / name).write_bytes(encode(Image.fromarray(pixels_of(99)), "JPEG"))
    assert (
        sum(shard.samples for shard in prepare(task_of(data), tmp_path / "p").splits["train"]) == 17
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_the_image(kind: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    decoded = decode_image(encode(red, kind, save_all=True, append_images=[blue]), 8)
    assert np.abs(decoded[:, 4, 4].astype(int) - [255, 0, 0]).max() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_tiffs_of_every_common_mode_are_read(mode: str) -> None:
    grey = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    assert decode_image(encode(grey, "TIFF"), 8).min() >= 250


def test_grey_values_beyond_sixteen_bits_are_refused() -> None:
    deep = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    with pytest.raises(DataError, match="x: an image of values beyond 16 bits has no known range"):
        decode_image(encode(deep, "TIFF"), 4, "x")
    assert (
        decode_image(encode(Image.fromarray(np.full((4, 4), 65535, np.uint16)), "TIFF"), 4).min()
        == 255
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty, 0 bytes; copy it again"),
        (b"<!DOCTYPE html><html lang=en>", "an HTML page; download the image again"),
        (b"\n<?xml version='1.0'?><!-- x --><HTML>", "an HTML page"),
        (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>",
            "an XML text; download the image again",
        ),
        (b'{"error": "rate limit"}', "a JSON text; download the image again"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video; extract its frames as images"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "a Git LFS pointer, not the file itself; run `git lfs pull`",
        ),
        (b"%PDF-1.7\n", "a PDF document; convert it to JPEG or PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "an SVG drawing"),
        (bytes(4096), "nothing but zero bytes; copy it again"),
        (b"PK\3\4" + bytes(100), "a ZIP archive; unpack it"),
        (bytes(128) + b"DICM", "a DICOM image"),
        (b"\xff\xd8\xff\xe0", "a damaged JPEG image"),
        (b"GIF89a", "a damaged GIF image"),
        (
            b"hello",
            (
                "its first bytes are b'hello', those of no image; expected JPEG, PNG, WEBP, BMP,"
                " TIFF, GIF, AVIF or PPM"
            ),
        ),
    ],
)
def test_what_is_not_an_image_is_named_by_its_first_bytes(content: bytes, words: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_image(content, 8, "a.jpg")
    assert str(caught.value).startswith("a.jpg: cannot be decoded: ")
    assert words in str(caught.value)
    assert "0x" not in str(caught.value)


def test_naming_a_file_takes_no_longer_for_hostile_text() -> None:
    assert explain(b"<!a>" * 10_000)  # nested repetition would take 2^128 steps


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_is_refused_with_the_way_out(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    readable_formats.cache_clear()
    with pytest.raises(
        DataError,
        match="a HEIC image; convert it to JPEG or PNG, or install the package pillow-heif",
    ):
        decode_image(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic", 8)
    readable_formats.cache_clear()


def test_heic_is_read_where_its_package_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    content = encode(Image.new("RGB", (64, 64), "red"), "HEIF")
    assert extension_of(content) in IMAGE_EXTENSIONS
    assert np.abs(decode_image(content, 8)[:, 4, 4].astype(int) - [255, 0, 0]).max() < 8


# --- EXIF, and many pixels ------------------------------------------------------------------------


def png_with(pixels: np.ndarray, name: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk, with a right checksum."""
    content = encode_png(pixels)
    end = content.index(b"IDAT") - 4
    return (
        content[:end]
        + struct.pack(">I", len(body))
        + name
        + body
        + struct.pack(">I", zlib.crc32(name + body))
        + content[end:]
    )


@pytest.mark.parametrize(
    "exif",
    [
        b"garbage!",
        b"",
        b"MM\0*\0\0\0\x08",  # ends before its directory
        # 65,535 entries, one of four billion values
        b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\x00\x03\xff\xff\xff\xff\0\0\0\x06",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0zzzz\0\0\0\0",  # the orientation is a text
    ],
)
def test_malformed_exif_does_not_make_an_image_unreadable(exif: bytes) -> None:
    pixels = pixels_of(3, (8, 8))
    webp = (
        encode(Image.fromarray(pixels), "WEBP", lossless=True, exif=exif)
        if exif
        else encode_png(pixels)
    )
    for content in (png_with(pixels, b"eXIf", exif), webp):
        assert np.array_equal(decode_image(content, 8), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000)),
        (b"iCCP", b"no end"),
        (b"gAMA", b""),
    ],
)
def test_no_metadata_make_a_png_unreadable(name: bytes, body: bytes) -> None:
    pixels = pixels_of(3, (8, 8))
    content = png_with(pixels, name, body)
    assert np.array_equal(decode_image(content, 8), pixels.transpose(2, 0, 1))
    content = content.replace(b"IDAT", b"IDAt")
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(content, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_as_pillow_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.fromarray(pixels_of(4, (8, 8))), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode_image(content, 8), expected.transpose(2, 0, 1))


def test_a_hundred_megapixels_are_read_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode_image(encode_png(np.zeros((60, 100, 3), np.uint8)), 8).max() == 0
    assert caught == []
    with pytest.raises(DataError, match=r"big: refused, more than 8,000 pixels; scale it down"):
        decode_image(encode_png(np.zeros((100, 100, 3), np.uint8)), 8, "big")


def test_no_thread_that_decodes_takes_away_the_filters_of_another() -> None:
    content = encode_png(np.zeros((8, 8, 3), np.uint8))
    with ThreadPoolExecutor(4) as pool:
        decoding = [pool.submit(decode_image, content, 8) for _ in range(200)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            given = 0
            while not all(each.done() for each in decoding):
                warnings.warn("mine", UserWarning, stacklevel=1)
                given += 1
    assert [str(each.message) for each in caught] == ["mine"] * given


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same() -> None:
    smooth = np.asarray(Image.fromarray(pixels_of(5, (12, 16))).resize((640, 480)))
    content = encode(Image.fromarray(smooth), "JPEG", quality=95)
    whole = np.asarray(Image.open(io.BytesIO(content)).resize((40, 40), Image.Resampling.BICUBIC))
    found = decode_image(content, 40).transpose(1, 2, 0)
    assert np.abs(found.astype(int) - whole).max() <= 3
    assert not np.array_equal(found, whole)  # 480 px are more than four times 40
    fitting = decode_image(content, 130).transpose(1, 2, 0)
    exact = np.asarray(Image.open(io.BytesIO(content)).resize((130, 130), Image.Resampling.BICUBIC))
    assert np.array_equal(fitting, exact)


# --- mean, std ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels",
    [{"mean": [123.7, 116.3, 103.5]}, {"std": [58.4, 57.1, 57.4]}, {"mean": [-0.1, 0.5, 0.5]}],
)
def test_mean_and_std_of_the_0_255_scale_are_refused(channels: dict[str, Any]) -> None:
    for section in (
        lambda: Input(**channels),
        lambda: Backbone(model="vit_tiny_patch16_224", **channels),
    ):
        with pytest.raises(ValidationError, match=r"for pixels in \[0, 1\]"):
            section()


# --- prediction -----------------------------------------------------------------------------------


@pytest.fixture
def predictor() -> Predictor:
    """A predictor that gets as far as decoding."""
    predictor = object.__new__(Predictor)
    predictor.kind = kind_named("classification")
    predictor.metadata = SimpleNamespace(classes=["a", "b"], modality="images")  # type: ignore[assignment]
    predictor.backbone = SimpleNamespace(takes=Images(8))  # type: ignore[assignment]
    return predictor


def test_a_scoring_error_says_which_row(predictor: Predictor) -> None:
    good = encode_png(pixels_of(1))
    with pytest.raises(DataError, match=r"image 1: cannot be decoded: an HTML page"):
        PackModel(predictor).predict([good, b"<html>"])
    with pytest.raises(DataError, match=r"image 2: cannot be decoded: a PDF"):
        PackModel(predictor).predict([good, good, base64.b64encode(b"%PDF-1.7").decode()])
    with pytest.raises(
        DataError, match=r"image 0: given an array of float64 \[4, 4, 3\]; expected uint8"
    ):
        predictor.predict([np.zeros((4, 4, 3))])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "is a folder; expected an image"),
        (lambda path: None, "no such image"),
        (lambda path: path.touch(), "is empty"),
    ],
)
def test_a_path_that_is_no_image_is_named(
    make: Any, words: str, predictor: Predictor, tmp_path: Path
) -> None:
    make(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=rf"x\.jpg: .*{words}"):
        predictor.predict([tmp_path / "x.jpg"])
