"""JPEG files as cameras, phones, scanners and editors write them, and some that nobody would."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION = 0x0112


def odd_jpegs(photos: Sequence[np.ndarray], count: int, size: int, seed: int = 0) -> Iterator[bytes]:
    """`count` files made of `photos`, uint8 (H, W, 3), for a network that takes `size` x `size`; a function of its arguments alone."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        width, height = _dimensions(index, size, rng)
        picture = Image.fromarray(_cut(photos, rng)).resize((width, height), Image.Resampling(int(rng.choice([0, 1, 2, 3]))))
        if rng.random() < 0.3:  # something small lies in it
            small = Image.fromarray(photos[rng.integers(len(photos))])
            small.thumbnail((max(1, width // 2), max(1, height // 2)))
            picture.paste(small, (int(rng.integers(width)), int(rng.integers(height))))
        yield _saved(picture, rng)


def _dimensions(index: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Width and height; kinds take turns."""

    def side(low: int, high: int) -> int:
        return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))

    kinds = [
        lambda: (side(4, 400), side(4, 400)),
        lambda: (1, side(1, 400)),
        lambda: (side(size - 3, size + 3), side(size - 3, size + 3)),
        lambda: (side(2, 12), side(100, 900)),
        lambda: (2 * side(16, 120) + 1, 2 * side(16, 120) + 1),
        lambda: (side(2, 20), side(2, 20)),
        lambda: (side(300, 1000), side(300, 1000)) if index % 30 == 0 else (side(20, 200), side(20, 200)),
        lambda: (size, side(size, 300)),
    ]
    width, height = kinds[index % len(kinds)]()
    return (width, height) if rng.random() < 0.5 else (height, width)


def _cut(photos: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A part of a photo."""
    photo = photos[rng.integers(len(photos))]
    edges = [np.sort(rng.choice(side + 1, 2, replace=False)) for side in photo.shape[:2]]
    if rng.random() < 0.5:  # most of it
        edges = [np.array([0, side]) for side in photo.shape[:2]]
    (top, bottom), (left, right) = edges
    return np.ascontiguousarray(photo[top:bottom, left:right])


def _saved(picture: Image.Image, rng: np.random.Generator) -> bytes:
    picture = picture.convert(str(rng.choice(["RGB", "L", "CMYK"], p=[0.75, 0.13, 0.12])))
    options = {"quality": int(rng.integers(5, 101)), "progressive": bool(rng.random() < 0.3), "optimize": bool(rng.random() < 0.3)}
    if picture.mode == "RGB":
        options |= {"keep_rgb": True} if rng.random() < 0.1 else {"subsampling": int(rng.integers(3))}
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[ORIENTATION] = int(rng.integers(0, 10))  # 1 to 8 mean something
        options["exif"] = exif
    if rng.random() < 0.2:
        options["icc_profile"] = SRGB
    if rng.random() < 0.2:
        options["restart_marker_blocks"] = int(rng.integers(1, 9))
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()
