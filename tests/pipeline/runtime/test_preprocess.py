import numpy as np
import pytest
from PIL import Image

from pipeline.errors import BundleError
from pipeline.runtime.preprocess import MEAN, STD, Preprocessing

RULE = Preprocessing(8)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_square_of_the_right_size_is_untouched():
    image = noise(8, 8)
    assert np.array_equal(RULE.pixels(Image.fromarray(image)), image.transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(8, 13), (13, 8), (9, 10), (100, 31), (3, 5), (4, 200)])
def test_the_centre_of_the_resized_image_is_kept(width, height):
    pixels = RULE.pixels(Image.fromarray(noise(width, height)))
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.uint8
    short = min(width, height)
    scaled = Image.fromarray(noise(width, height)).resize((width * 8 // short, height * 8 // short), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 8) / 2), round((scaled.height - 8) / 2)
    assert np.array_equal(pixels, np.asarray(scaled)[top : top + 8, left : left + 8].transpose(2, 0, 1))


def test_a_rotated_photo_is_turned_upright():
    image = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    photo = Image.fromarray(image)
    photo.info["exif"] = exif.tobytes()
    assert np.array_equal(RULE.pixels(photo), np.rot90(image, -1).transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(1, 60_000), (60_000, 1)])
def test_of_a_long_strip_the_middle_is_kept(width, height):
    strip = np.zeros((height, width, 3), np.uint8)
    strip.reshape(-1, 3)[30_000 - 10 : 30_000 + 10] = 255
    assert (RULE.pixels(Image.fromarray(strip)) == 255).all()


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_of_16_bit_greys_the_upper_half_counts(order):
    grey = noise(8, 8)[..., 0]
    deep = (grey.astype(np.uint16) * 256 + 77).astype(order)
    assert np.array_equal(RULE.pixels(Image.frombytes("I;16" if order == "<u2" else "I;16B", (8, 8), deep.tobytes())), np.stack([grey] * 3))
    assert np.array_equal(RULE.pixels(Image.fromarray(deep.astype(np.int32))), np.stack([grey] * 3))


def test_floating_point_pixels_are_refused():
    with pytest.raises(OSError, match="floating-point"):
        RULE.pixels(Image.fromarray(np.zeros((8, 8), np.float32)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    assert RULE.pixels(Image.fromarray(noise(8, 8)).convert(mode)).shape == (3, 8, 8)


def test_the_tensor_is_normalised_per_channel_in_float32():
    pixels = noise(8, 8).transpose(2, 0, 1)[None]
    tensor = RULE.tensor(pixels)
    expected = (pixels / 255 - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
    assert tensor.dtype == np.float32
    np.testing.assert_allclose(tensor, expected, atol=1e-5)


def test_the_rule_survives_json_and_refuses_nonsense():
    assert Preprocessing.from_dict(RULE.to_dict()) == RULE
    for change in ({"image_size": 0}, {"image_size": "big"}, {"mean": [1, 2]}, {"std": [1, 0, 1]}, {"std": None}):
        with pytest.raises(BundleError, match="preprocessing"):
            Preprocessing.from_dict({**RULE.to_dict(), **change})
