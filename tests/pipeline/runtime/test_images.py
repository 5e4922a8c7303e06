from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.runtime.images import FORMATS, Format, container_bytes, encode_image, open_encoded


def picture(size: int = 32, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (3, size // 4, size // 4), np.uint8)
    large = [np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)) for plane in noise]
    return np.stack(large)


def back(data: bytes, image_format: Format, quality: int) -> np.ndarray:
    return np.asarray(open_encoded(data, image_format, quality)).transpose(2, 0, 1)


@pytest.mark.parametrize(("image_format", "quality"), [("png", 0), ("webp", 100)])
def test_lossless_formats_bring_back_every_pixel(image_format: Format, quality: int) -> None:
    pixels = picture()
    assert np.array_equal(back(encode_image(pixels, image_format, quality), image_format, quality), pixels)


@pytest.mark.parametrize("image_format", ["webp", "jpeg", "jpeg-bare"])
def test_a_lower_quality_costs_fewer_bytes_and_more_error(image_format: Format) -> None:
    pixels = picture()
    sizes, errors = [], []
    for quality in (90, 50, 10):
        data = encode_image(pixels, image_format, quality)
        sizes.append(len(data))
        errors.append(np.abs(back(data, image_format, quality).astype(int) - pixels).mean())
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 12


@pytest.mark.parametrize("quality", [10, 75, 95])
@pytest.mark.parametrize("size", [32, 224])
def test_a_bare_jpeg_is_the_same_picture_without_the_tables(quality: int, size: int) -> None:
    pixels = picture(size)
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    bare = encode_image(pixels, "jpeg-bare", quality)
    assert len(file.getvalue()) - len(bare) > 500, "which at 32 pixels is more than the picture"
    assert np.array_equal(back(bare, "jpeg-bare", quality), np.asarray(Image.open(file)).transpose(2, 0, 1))


def test_container_bytes_are_what_an_empty_picture_costs_too() -> None:
    pixels, grey = picture(), np.full((3, 32, 32), 128, np.uint8)
    for image_format in FORMATS:
        full, empty = (encode_image(each, image_format, 75) for each in (pixels, grey))
        assert 0 < container_bytes(full, image_format) < len(full)
        assert len(full) - container_bytes(full, image_format) > 3 * (len(empty) - container_bytes(empty, image_format))


def test_tables_made_for_a_picture_are_part_of_it() -> None:
    pixels = picture()
    own, standard = ((data := encode_image(pixels, name, 50), len(data) - container_bytes(data, name)) for name in ("jpeg", "jpeg-bare"))
    assert len(own[0]) > own[1] > standard[1], "32 pixels do not pay for tables of their own"


@pytest.mark.parametrize("image_format", FORMATS)
def test_bytes_that_are_no_picture_are_refused(image_format: Format) -> None:
    with pytest.raises(DataError, match=rf"{image_format} of 10 bytes cannot be decoded .*; send the image again"):
        open_encoded(b"0123456789", image_format, 50)
