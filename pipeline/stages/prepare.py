"""prepare: images of one of three sources -> uint8 tensors in four splits, and a card that says what they are."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from pipeline.errors import DataError, Interrupted
from pipeline.files import atomic_directory, atomic_write_json
from pipeline.params import Params
from pipeline.paths import DATA, DATA_CARD, split_file
from pipeline.runtime.preprocess import MEAN, STD, Preprocessing
from pipeline.sources import Images, open_source

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

CHUNK = 256


def run(params: Params, tracker: Tracker) -> dict[str, Any]:
    """Write artifacts/data/{train,validation,gate,test}.safetensors (images uint8 (N, 3, S, S), labels int64 (N,)) and card.json; return the card.

    Images go to disk as they are read, so data larger than memory works. In each file the classes take turns: any prefix is as balanced as the data.

    Raises:
        DataError: images are missing, broken, or too few for a split.
        Interrupted: Ctrl-C; nothing is kept.
    """
    source = open_source(params.data)
    size = params.data.image_size
    held = Fraction(str(params.data.validation_fraction))
    splits = {name: (source.train, indices) for name, indices in divide(source.train.labels, held).items()}
    splits["test"] = (source.test, turns(source.test.labels))
    for name, (_, indices) in splits.items():
        if not indices:
            raise DataError(f"the {name} split would be empty with {len(source.train.labels)} training images; add images or raise data.validation_fraction.")
    written = {}
    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    try:
        with atomic_directory(DATA) as folder, bar, ThreadPoolExecutor(params.run.threads) as pool:
            task = bar.add_task("reading images", total=sum(len(indices) for _, indices in splits.values()))
            for name, (images, indices) in splits.items():
                written[name] = _Writer(folder / split_file(name).name, images, indices, Preprocessing(size)).write(pool, partial(bar.advance, task))
            hashes = {name: writer.sha256 for name, writer in written.items()}
            card: dict[str, Any] = {
                "source": params.data.source,
                "classes": source.classes,
                "image_size": size,
                "counts": {name: len(indices) for name, (_, indices) in splits.items()},
                "channels": written["train"].statistics(),
                "normalisation": {"mean": list(MEAN), "std": list(STD), "why": "the same for all data, so that weights trained elsewhere fit"},
                "split_rule": f"within each class, in {source.order}, {_share(held)}, the first included, is held out, "
                "alternately to validation and gate; files hold the classes in turns",
                "test_rule": source.test_rule,
                "sha256": {**hashes, "all": hashlib.sha256("".join(hashes.values()).encode()).hexdigest()},
            }
            atomic_write_json(folder / DATA_CARD.name, card)
    except KeyboardInterrupt:
        raise Interrupted("reading the images was interrupted; nothing is kept, `dvc repro` starts it over.") from None
    tracker.log_metrics({f"images_{name}": float(count) for name, count in card["counts"].items()})
    tracker.log_file(DATA_CARD)
    return card


def ranks(labels: Sequence[int]) -> list[int]:
    """How many earlier images have the same label, for each image."""
    seen: dict[int, int] = {}
    result = []
    for label in labels:
        result.append(seen.get(label, 0))
        seen[label] = result[-1] + 1
    return result


def turns(labels: Sequence[int]) -> list[int]:
    """Indices of all images, the classes taking turns."""
    rank = ranks(labels)
    return sorted(range(len(labels)), key=lambda index: (rank[index], labels[index]))


def divide(labels: Sequence[int], share: Fraction) -> dict[str, list[int]]:
    """Indices of the train, validation and gate splits: of each class an evenly spread `share` is held out, the first to validation, the next to gate."""
    rank = ranks(labels)
    splits: dict[str, list[int]] = {"train": [], "validation": [], "gate": []}
    for index in turns(labels):
        before, after = ceil(rank[index] * share), ceil((rank[index] + 1) * share)
        splits[("validation", "gate")[before % 2] if after > before else "train"].append(index)
    return splits


def _share(held: Fraction) -> str:
    return f"every {held.denominator}th training image" if held.numerator == 1 else f"{float(held):g} of the training images, evenly spread"


class _Writer:
    """One safetensors file written front to back: header, labels, then image by image."""

    def __init__(self, path: Path, images: Images, indices: Sequence[int], preprocessing: Preprocessing) -> None:
        self.path, self.images, self.indices, self.preprocessing = path, images, indices, preprocessing
        self.sums, self.squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
        self.sha256 = ""

    def write(self, pool: ThreadPoolExecutor, advance: Any) -> _Writer:
        labels = np.array([self.images.labels[index] for index in self.indices], "<i8").tobytes()
        digest = hashlib.sha256()
        with self.path.open("wb") as file:
            for piece in (self._header(len(labels)), labels):
                file.write(piece)
                digest.update(piece)
            for start in range(0, len(self.indices), CHUNK):
                for pixels in pool.map(self._pixels, self.indices[start : start + CHUNK]):
                    data = pixels.tobytes()
                    file.write(data)
                    digest.update(data)
                    wide = pixels.reshape(3, -1).astype(np.int64)
                    self.sums += wide.sum(1)
                    self.squares += (wide * wide).sum(1)
                    advance(1)
        self.sha256 = digest.hexdigest()
        return self

    def _header(self, label_bytes: int) -> bytes:
        shape = [len(self.indices), 3, self.preprocessing.image_size, self.preprocessing.image_size]
        tensors = {
            "labels": {"dtype": "I64", "shape": shape[:1], "data_offsets": [0, label_bytes]},
            "images": {"dtype": "U8", "shape": shape, "data_offsets": [label_bytes, label_bytes + int(np.prod(shape))]},
        }
        text = json.dumps(tensors).encode()
        text += b" " * (-len(text) % 8)  # the format wants tensors aligned to 8 bytes
        return len(text).to_bytes(8, "little") + text

    def _pixels(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.images.read(index, self.preprocessing)

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation per channel, of pixels in [0, 1]; exact sums, so the same on every machine."""
        count = len(self.indices) * self.preprocessing.image_size**2
        mean = self.sums / count / 255
        std = np.sqrt(self.squares / count / 255**2 - mean**2)
        return {"mean": [round(float(value), 6) for value in mean], "std": [round(float(value), 6) for value in std]}
