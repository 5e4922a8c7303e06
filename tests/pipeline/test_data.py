from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.data import Batches, Sent, WholeSplit, augmented, cut_mixed, load_card, load_split, normalise
from pipeline.errors import CoinferError, DataError
from pipeline.params import Finetune
from pipeline.paths import DATA, split_file
from pipeline.runtime.images import Format
from pipeline.runtime.preprocess import MEAN, STD, Preprocessing


def settings(**fields: object) -> Finetune:
    return Finetune.model_validate({"epochs": 1, "learning_rate": 0.1, "batch_size": 4, "crop_padding": 2, "flip": True} | fields)


def images(count: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator), torch.arange(count) % 3


def as_lists(batches: Batches) -> list[tuple[list[float], list[int]]]:
    return [(x.flatten().tolist(), y.tolist()) for x, y in batches]


def test_every_augmented_image_is_a_crop_of_the_reflected_one_perhaps_flipped() -> None:
    original, _ = images(6)
    result = augmented(original, torch.arange(6), 2, True, np.random.default_rng(0))
    assert result.dtype == torch.uint8
    padded = F.pad(original.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    for image, border in zip(result, padded, strict=True):
        crops = [border[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for crop in crops)


def test_crops_and_flips_differ_from_sample_to_sample() -> None:
    one, _ = images(1)
    result = augmented(one, torch.zeros(40, dtype=torch.int64), 2, True, np.random.default_rng(0))
    assert len({tuple(image.flatten().tolist()) for image in result}) > 20


def test_without_padding_and_flip_images_are_left_alone() -> None:
    original, _ = images(5)
    assert torch.equal(augmented(original, torch.tensor([3, 1]), 0, False, np.random.default_rng(0)), original[[3, 1]])


def test_cutmix_puts_a_rectangle_of_another_image_into_each_and_shares_its_label_by_area() -> None:
    tones = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 16, 16)
    mixed, labels = cut_mixed(tones, torch.eye(40), np.random.default_rng(0))
    shapes = set()
    for number, (image, label) in enumerate(zip(mixed, labels, strict=True)):
        assert torch.equal(image[0], image[1])
        foreign = image[0] != number
        rows, columns = foreign.any(1), foreign.any(0)
        assert torch.equal(foreign, rows[:, None] & columns)
        assert len(image[0][foreign].unique()) <= 1
        expected = torch.bincount(image[0].flatten().long(), minlength=40) / 256
        torch.testing.assert_close(label, expected)
        shapes.add((int(rows.sum()), int(columns.sum())))
    assert len(shapes) > 20


def test_batches_that_cutmix_passes_over_are_those_without_it() -> None:
    split = images(400)
    plain, mixed = (list(Batches(split, settings(cutmix=share), 1, lambda: 0)) for share in (0.0, 0.5))
    same = [torch.equal(x, y) for (x, _), (y, _) in zip(plain, mixed, strict=True)]
    assert 30 < sum(same) < 70
    for untouched, (_, labels), (_, shares) in zip(same, plain, mixed, strict=True):
        torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
        assert not untouched or torch.equal(shares, F.one_hot(labels, 3).float())


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    split = images(14)
    again = [as_lists(Batches(split, settings(), 1, lambda: 2)) for _ in range(2)]
    assert again[0] == again[1]
    assert as_lists(Batches(split, settings(), 1, lambda: 3)) != again[0]
    assert as_lists(Batches(split, settings(), 2, lambda: 2)) != again[0]


def test_batches_also_fix_what_dropout_draws() -> None:
    def drawn() -> list[float]:
        return [torch.rand(1).item() for _ in Batches(images(14), settings(), 1, lambda: 0)]

    first = drawn()
    torch.rand(5)
    assert drawn() == first
    assert len(set(first)) == len(first)


def test_an_epoch_shows_every_image_at_most_once_and_leaves_out_less_than_a_batch() -> None:
    split = images(14)[0], torch.arange(14)
    batches = Batches(split, settings(), 0, lambda: 0)
    labels = [label for _, y in batches for label in y.tolist()]
    assert len(batches) == 3
    assert len(labels) == len(set(labels)) == 12


def test_fewer_images_than_a_batch_still_make_one() -> None:
    assert [len(y) for _, y in Batches(images(3), settings(batch_size=64), 0, lambda: 0)] == [3]


def test_normalise_is_what_the_device_does() -> None:
    original, _ = images(2)
    assert np.array_equal(normalise(original).numpy(), Preprocessing(8, MEAN, STD).tensor(original.numpy()))


@pytest.mark.parametrize(("image_format", "quality"), [("webp", 20), ("jpeg", 20), ("jpeg-bare", 20), ("webp", 100), ("png", 100)])
def test_what_arrives_of_an_image_is_what_its_file_holds(image_format: Format, quality: int) -> None:
    originals = images(3, 32)[0]
    arrived, files = Sent(image_format, quality).and_files(originals)
    for picture, file, original in zip(arrived, files, originals, strict=True):
        if image_format != "jpeg-bare":
            assert np.array_equal(picture.permute(1, 2, 0), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
        assert torch.equal(picture, original) == (quality == 100)


def test_a_whole_split_comes_in_order() -> None:
    whole = WholeSplit(images(300))
    assert torch.equal(torch.cat([y for _, y in whole]), images(300)[1])
    assert len(whole) == len(list(whole)) == 2


def test_missing_and_damaged_splits_are_named(workdir: object) -> None:
    with pytest.raises(DataError, match=r"train\.safetensors is missing; run `dvc repro`"):
        load_split("train")
    with pytest.raises(CoinferError, match=r"card\.json is missing; run `dvc repro`"):
        load_card()
    DATA.mkdir(parents=True)
    split_file("train").write_bytes(b"not tensors")
    with pytest.raises(DataError, match=r"train\.safetensors cannot be read"):
        load_split("train")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process holds in memory")
def test_more_than_two_gigabytes_are_mapped_and_not_read(workdir: object) -> None:
    count, size = 2300, 576

    def resident_bytes() -> int:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    shape = [count, 3, size, size]
    entries = {
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, 8 * count]},
        "images": {"dtype": "U8", "shape": shape, "data_offsets": [8 * count, 8 * count + math.prod(shape)]},
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    DATA.mkdir(parents=True)
    with split_file("train").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8 * count + math.prod(shape))  # sparse: takes no space on disk
    before = resident_bytes()
    split = load_split("train")
    assert split[0].nbytes > 2e9
    next(iter(Batches(split, settings(), 0, lambda: 0)))
    assert resident_bytes() - before < 2e8
