"""Where images come from: scikit-learn's digits, torchvision's CIFAR10, or a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DataError
from pipeline.params import Data
from pipeline.runtime.preprocess import IMAGE_SUFFIXES, Preprocessing, open_image

DIGITS_TEST = 360


@dataclass(frozen=True)
class Images:
    """Labelled images, opened one by one; `where` names the i-th in messages."""

    labels: Sequence[int]
    open: Callable[[int], Image.Image]
    where: Callable[[int], str]

    def read(self, index: int, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """Pixels of image `index`: uint8 (3, S, S).

        Raises:
            DataError: it is not an image Pillow can decode.
        """
        try:
            with self.open(index) as image:
                return preprocessing.pixels(image)
        except Exception as error:  # Pillow raises many unrelated kinds on a broken file
            raise DataError(f"{self.where(index)} cannot be read as an image ({error}); repair or remove it.") from error


@dataclass(frozen=True)
class Source:
    classes: list[str]
    train: Images
    test: Images
    order: str
    test_rule: str


def open_source(data: Data) -> Source:
    """The source `data.source` with its images not yet decoded.

    Raises:
        DataError: a folder, class or download is missing or does not fit.
    """
    if data.source == "digits":
        return _digits()
    return _cifar10(Path(data.path)) if data.source == "cifar10" else _folder(Path(data.path))


def _arrays(images: NDArray[np.uint8], labels: Sequence[int], name: str) -> Images:
    """Images of an array (N, H, W) or (N, H, W, 3)."""
    return Images(labels, lambda index: Image.fromarray(images[index]), lambda index: f"image {index} of {name}")


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    labels = [int(label) for label in digits.target]
    classes = [str(name) for name in digits.target_names]
    train, test = (_arrays(images[part], labels[part], "scikit-learn's digits") for part in (slice(-DIGITS_TEST), slice(-DIGITS_TEST, None)))
    return Source(classes, train, test, "index order", f"the last {DIGITS_TEST} samples")


def _cifar10(root: Path) -> Source:
    from torchvision.datasets import CIFAR10

    def load(train: bool) -> CIFAR10:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old pickles in the archive make recent numpy complain
            try:
                return CIFAR10(root, train=train)
            except RuntimeError:  # absent or incomplete
                return CIFAR10(root, train=train, download=True)

    try:
        train, test = load(True), load(False)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"CIFAR-10 is not in {root} and cannot be downloaded there ({error}); copy its images to this machine as train/CLASS/* and test/CLASS/* "
            "and set data.source to folder."
        ) from error
    first, second = (_arrays(part.data, [int(label) for label in part.targets], "CIFAR-10") for part in (train, test))
    return Source(list(train.classes), first, second, order="index order", test_rule="CIFAR-10's own")


def _folder(root: Path) -> Source:
    train, test = _class_files(root / "train"), _class_files(root / "test")
    classes = list(train)
    if len(classes) < 2:
        raise DataError(f"{root / 'train'} holds {len(classes)} class; a classifier needs at least two folders there.")
    unknown = [name for name in test if name not in train]
    if unknown:
        raise DataError(f"{root / 'test' / unknown[0]} is a class that {root / 'train'} does not have; add training images for it or remove it.")
    untested = [name for name in train if name not in test]
    if untested:
        raise DataError(f"{root / 'train' / untested[0]} is a class that {root / 'test'} does not have; add test images for it or remove it.")
    return Source(classes, _files(train, classes), _files(test, classes), order="sorted name order", test_rule="the images under test/")


def _files(files: dict[str, list[Path]], classes: list[str]) -> Images:
    paths = [path for name in files for path in files[name]]
    labels = [classes.index(name) for name in files for _ in files[name]]
    return Images(labels, lambda index: open_image(paths[index]), lambda index: str(paths[index]))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both in sorted name order; files that are no images by extension are passed over."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = {name: sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".") for name in names}
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); data.path must hold train/CLASS/* and test/CLASS/*.") from error
    for name, found in files.items():
        if not found:
            raise DataError(f"{folder / name} holds no image; add some or remove the folder.")
    if not files:
        raise DataError(f"{folder} holds no class folder; images go to {folder.name}/CLASS/*.")
    return files
