from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from pipeline.data import load_card, load_split
from pipeline.errors import CoinferError, DataError, Interrupted
from pipeline.params import Params, parse_params
from pipeline.paths import DATA, DATA_CARD
from pipeline.runtime.preprocess import Preprocessing
from pipeline.sources import Images
from pipeline.stages import prepare


def with_data(fields: dict[str, Any], **data: Any) -> Params:
    return parse_params({**fields, "data": {**fields["data"], **data}})


@pytest.fixture
def folder(workdir: Path) -> Path:
    """Two classes, 24 training and 3 test images each; the red value of a training image is its place in name order."""
    root = workdir / "images"
    for part, count in (("train", 24), ("test", 3)):
        for green, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (12, 10), (index, green, 0)).save(root / part / name / f"{index:03}.png")
    return root


def test_digits_become_rgb_tensors_with_a_card(workdir: Path, digits_params: Params, tracker: Any) -> None:
    card = prepare.run(digits_params, tracker)
    assert card == json.loads(DATA_CARD.read_text())
    assert card["counts"] == {"train": 1287, "validation": 80, "gate": 70, "test": 360}
    assert card["classes"] == [str(digit) for digit in range(10)]
    images, labels = load_split("test")
    assert images.dtype == torch.uint8
    assert images.shape == (360, 3, 16, 16)
    assert labels.dtype == torch.int64
    assert images.max() == 255
    assert torch.equal(images[:, 0], images[:, 2])
    train = load_split("train")[0].double() / 255
    assert card["channels"]["mean"] == pytest.approx(train.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert card["channels"]["std"] == pytest.approx(train.std((0, 2, 3), correction=0).tolist(), abs=1e-6)
    assert card["sha256"]["test"] == hashlib.sha256((DATA / "test.safetensors").read_bytes()).hexdigest()
    assert load_card().num_classes == 10


def test_two_runs_give_the_same_bytes(workdir: Path, digits_params: Params, tracker: Any) -> None:
    first = prepare.run(digits_params, tracker)
    assert prepare.run(digits_params, tracker) == first
    assert sorted(path.name for path in DATA.parent.iterdir()) == ["data"]


def test_every_kth_of_a_class_is_held_out_alternately(folder: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    prepare.run(with_data(digits_fields, source="folder", path=str(folder), image_size=10, validation_fraction=0.2), tracker)
    held = {name: sorted(load_split(name)[0][:, :2, 0, 0].tolist()) for name in ("validation", "gate", "train")}
    assert held["validation"] == [[place, green] for place in (0, 10, 20) for green in (0, 1)]
    assert held["gate"] == [[place, green] for place in (5, 15) for green in (0, 1)]
    assert held["train"] == [[place, green] for place in range(24) if place % 5 for green in (0, 1)]


def test_a_share_that_is_no_one_in_k_is_held_out_evenly_too(folder: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    card = prepare.run(with_data(digits_fields, source="folder", path=str(folder), image_size=10, validation_fraction=0.4), tracker)
    counts = card["counts"]
    assert counts["validation"] + counts["gate"] == pytest.approx(0.4 * 48, abs=2)
    assert abs(counts["validation"] - counts["gate"]) <= 2
    assert "0.4 of the training images, evenly spread" in card["split_rule"]
    places = sorted({place for name in ("validation", "gate") for place in load_split(name)[0][:, 0, 0, 0].tolist()})
    assert places == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]


def test_hidden_files_are_no_images(folder: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    params = with_data(digits_fields, source="folder", path=str(folder), image_size=10)
    counts = prepare.run(params, tracker)["counts"]
    for split in ("train", "test"):
        kind = next((folder / split).iterdir())
        (kind / "._0.png").write_bytes(b"what macOS leaves beside 0.png")
    assert prepare.run(params, tracker)["counts"] == counts


def test_classes_take_turns_in_a_file(folder: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    prepare.run(with_data(digits_fields, source="folder", path=str(folder), image_size=10), tracker)
    assert load_split("train")[1].tolist() == [0, 1] * (len(load_split("train")[1]) // 2)


def test_folder_images_follow_the_devices_resize_rule(folder: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "test" / "cat" / "000.png")
    (folder / "test" / "cat" / "notes.txt").write_text("not an image")
    prepare.run(with_data(digits_fields, source="folder", path=str(folder), image_size=8), tracker)
    assert np.array_equal(load_split("test")[0][0].numpy(), Preprocessing(8).pixels(Image.fromarray(pixels)))
    assert len(load_split("test")[1]) == 6


def test_a_broken_image_is_named(folder: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    broken = folder / "train" / "dog" / "007.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(DataError, match=r"train/dog/007\.png cannot be read as an image"):
        prepare.run(with_data(digits_fields, source="folder", path=str(folder)), tracker)
    assert not DATA.exists()


def break_empty_class(root: Path) -> None:
    (root / "train" / "owl").mkdir()


def break_unknown_class(root: Path) -> None:
    (root / "test" / "dog").rename(root / "test" / "owl")


def break_untested_class(root: Path) -> None:
    shutil.rmtree(root / "test" / "dog")


def break_no_test(root: Path) -> None:
    (root / "test").rename(root / "tests")


def break_one_class(root: Path) -> None:
    (root / "train" / "dog").rename(root / "dog")


def break_few(root: Path) -> None:
    for path in (root / "train").glob("*/0[012]*.png"):
        if path.stem > "003":
            path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_empty_class, "train/owl holds no image"),
        (break_unknown_class, "test/owl is a class that .*train does not have"),
        (break_untested_class, "train/dog is a class that .*test does not have"),
        (break_no_test, "test cannot be read"),
        (break_one_class, "train holds 1 class"),
        (break_few, "the gate split would be empty with 8 training images"),
    ],
)
def test_folders_that_cannot_work_are_refused(folder: Path, digits_fields: dict[str, Any], tracker: Any, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        prepare.run(with_data(digits_fields, source="folder", path=str(folder)), tracker)


def test_torchvisions_cifar10_is_read(workdir: Path, digits_fields: dict[str, Any], tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = workdir / "cifar" / CIFAR10.base_folder
    root.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
    contents = {
        "train": {"data": pixels, "labels": [index % 2 for index in range(40)]},
        "test": {"data": pixels[:4], "labels": [0, 1, 0, 1]},
        "batches.meta": {"label_names": ["cat", "dog"]},
    }
    for name, content in contents.items():
        (root / name).write_bytes(pickle.dumps(content))
    md5 = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(CIFAR10, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    card = prepare.run(with_data(digits_fields, source="cifar10", path="cifar", image_size=32), tracker)
    assert card["classes"] == ["cat", "dog"]
    assert card["counts"] == {"train": 36, "validation": 2, "gate": 2, "test": 4}
    assert np.array_equal(load_split("test")[0].numpy(), pixels[:4].reshape(4, 3, 32, 32))


def test_a_failed_download_says_to_use_a_folder(workdir: Path, digits_fields: dict[str, Any], tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(DataError, match=r"CIFAR-10 is not in cifar and cannot be downloaded .* set data.source to folder\.$"):
        prepare.run(with_data(digits_fields, source="cifar10", path="cifar"), tracker)


def test_ctrl_c_leaves_nothing_behind(workdir: Path, digits_params: Params, tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Images.read

    def interrupted(self: Images, index: int, preprocessing: Preprocessing) -> Any:
        if index == 500:
            raise KeyboardInterrupt
        return read(self, index, preprocessing)

    monkeypatch.setattr(Images, "read", interrupted)
    with pytest.raises(Interrupted, match="nothing is kept, `dvc repro` starts it over"):
        prepare.run(digits_params, tracker)
    assert list(DATA.parent.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(workdir: Path, digits_params: Params, tracker: Any) -> None:
    DATA.parent.write_text("a file where the folder should be")
    with pytest.raises(CoinferError, match="cannot write artifacts/data"):
        prepare.run(digits_params, tracker)
