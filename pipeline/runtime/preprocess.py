"""From an image to the network's input by one written rule, the same in training and on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import BundleError

# Pillow opens more, some by starting other programs; a camera's pictures and data sets need no more than these.
IMAGE_FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
MOST_ASPECT = 64  # of what is resized before the crop; of what is longer only the square is made, or a strip could fill the memory
MOST_PIXELS = 4096  # of a side: an image becomes twelve bytes for each pixel of the square
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def open_image(path: Path) -> Image.Image:
    """The picture in `path`, of one of `IMAGE_FORMATS`, not yet decoded.

    Raises:
        OSError: it cannot be read or is of no such format.
    """
    return Image.open(path, formats=list(IMAGE_FORMATS))


@dataclass(frozen=True)
class Preprocessing:
    """RGB, shorter side to `image_size` (Pillow bilinear, antialiased), centre crop, then (x/255 - mean)/std per channel.

    To the pixel what torchvision's Resize and CenterCrop give of a PIL image, for backbones trained with those; of strips longer than `MOST_ASPECT` within
    one level. Of 16-bit greys the upper 8 bits count.
    """

    image_size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The upright RGB square of `image`: uint8 (3, S, S). EXIF orientation is honoured; an S x S image is untouched.

        Raises:
            OSError: Pillow cannot decode the image (it decodes lazily), or its pixels are floating-point numbers.
        """
        upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
        size = self.image_size
        width, height = upright.size
        if (width, height) != (size, size):
            short = min(width, height)
            across, along = size * width // short, size * height // short
            left, top = round((across - size) / 2), round((along - size) / 2)
            square = left, top, left + size, top + size
            if max(width, height) > MOST_ASPECT * short:
                box = (left * width / across, top * height / along, square[2] * width / across, square[3] * height / along)
                upright = upright.resize((size, size), Image.Resampling.BILINEAR, box)
            else:
                upright = upright.resize((across, along), Image.Resampling.BILINEAR).crop(square)
        return np.ascontiguousarray(np.asarray(upright, dtype=np.uint8).transpose(2, 0, 1))

    def tensor(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, 3, S, S) to the float32 (N, 3, S, S) a network takes: divide by 255, subtract mean, divide by std, each in float32."""
        mean = np.array(self.mean, dtype=np.float32).reshape(3, 1, 1)
        std = np.array(self.std, dtype=np.float32).reshape(3, 1, 1)
        scaled = pixels.astype(np.float32)
        scaled /= np.float32(255)
        scaled -= mean
        scaled /= std
        return scaled

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "colour_order": "RGB", "resize": "shorter side, bilinear", "crop": "centre"}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Read back what `to_dict` wrote.

        Raises:
            BundleError: a key is missing, of the wrong kind or out of range.
        """
        try:
            mean, std, size = fields["mean"], fields["std"], fields["image_size"]
            numbers = [float(value) for value in (*mean, *std) if type(value) in (int, float)]
            if (len(mean), len(std), len(numbers)) != (3, 3, 6) or not all(abs(value) < 1e6 for value in numbers) or min(std) < 1e-6:
                raise ValueError("mean and std are three numbers each, std positive")
            if type(size) is not int or not 1 <= size <= MOST_PIXELS:
                raise ValueError(f"image_size is between 1 and {MOST_PIXELS}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"preprocessing cannot be used ({error!r}); export the bundle again.") from error
        return cls(size, (numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5]))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow itself cuts larger numbers off at 255."""
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers, of which nothing says what is white")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image
