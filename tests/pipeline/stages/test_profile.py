"""The profile stage: cuts with their sizes, and profiles of device and edge."""

import itertools
import json
import platform
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from models.cutting import cut_points
from pipeline.costs import measure
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.measure import measure_into
from pipeline.errors import CoinferError, Interrupted, ProfileError
from pipeline.params import Params, parse_params
from pipeline.paths import DATA_CARD, DevicePaths
from pipeline.stages import profile
from tests.tiny import tiny_backbone

PATHS = DevicePaths("camera")
KEY = "tests.tiny:tiny_backbone@3x16x16"
PLAN = {
    "threads": 1,
    "rounds": 1,
    "repeats": 3,
    "warmup": 1,
    "keep": [1, 0.5],
    "code_channels": [4],
    "strides": [1, 2],
    "coder_symbols": [64, 512],
    "webp_qualities": [100, 50],
}


def prepare(folder: Path) -> None:
    (folder / DATA_CARD).parent.mkdir(parents=True)
    (folder / DATA_CARD).write_text(json.dumps({"classes": [str(digit) for digit in range(10)]}))
    (folder / "profiles").mkdir(exist_ok=True)
    (folder / "profiles" / "measure.json").write_text(json.dumps(PLAN))


@pytest.fixture
def prepared(workdir: Path) -> Path:
    prepare(workdir)
    return workdir


def with_device(fields: dict[str, Any], **device: Any) -> Params:
    fields["devices"]["camera"] |= device
    return parse_params(fields)


def test_this_machine_is_measured_for_a_backbone_nobody_profiled(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    profile.run(with_device(digits_fields, slowdown=3), "camera", tracker)

    rows = json.loads(PATHS.cuts.read_text())
    assert [row["name"] for row in rows][:: len(rows) - 1] == ["input", "output"]
    assert rows[0]["feature_bytes"] == 3 * 16 * 16
    assert rows[1]["feature_bytes"] == 4 * rows[1]["elements"]

    device, edge = DeviceProfile.load(PATHS.device_profile), DeviceProfile.load(PATHS.edge_profile)
    (measured,) = edge.backbones.values()
    assert list(device.backbones) == list(edge.backbones) == [KEY]
    assert (device.slowdown, edge.slowdown) == (3, 1)
    assert device.backbones[KEY].full.median_ms == pytest.approx(3 * measured.full.median_ms, rel=1e-3)
    assert [block.name for block in measured.blocks] == [row["name"] for row in rows[1:]]
    assert [block.points[-1].macs for block in measured.blocks] == [after["macs"] - before["macs"] for before, after in pairwise(rows)]
    assert [block.points[0].macs < 0.6 * block.points[-1].macs for block in measured.blocks if len(block.shape) == 3] == [True] * (len(rows) - 2)
    assert set(measured.encoder) == set(measured.decoder) == {"8x16x16", "16x8x8"}
    assert "cuts.png" in tracker.figures
    assert PATHS.device_profile in tracker.files

    text = PATHS.device_profile.read_text()
    assert str(Path.cwd()) not in text
    assert platform.node() not in text


def test_cuts_through_blocks_are_measured_when_asked_for(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    measure_into(parse_params(digits_fields), Path("profiles/bench.json"))
    digits_fields["search"]["cuts"] = "all"
    profile.run(with_device(digits_fields), "camera", tracker)
    names = [row["name"] for row in json.loads(PATHS.cuts.read_text())]
    assert names == [cut.name for cut in cut_points(tiny_backbone(num_classes=10, image_size=16), torch.zeros(1, 3, 16, 16), "all")]
    (measured,) = DeviceProfile.load(PATHS.device_profile).backbones.values()
    assert [block.name for block in measured.blocks] == names[1:]
    assert measured.sum_over_full > 0
    by_blocks = {block.name for block in DeviceProfile.load(Path("profiles/bench.json")).backbones[KEY].blocks}
    assert by_blocks < set(names)
    with pytest.raises(ProfileError, match=r"measured on another .* or with other search\.cuts"):
        profile.run(with_device(digits_fields, profile="bench", edge_profile="bench"), "camera", tracker)


def test_ctrl_c_while_measuring_keeps_the_profile_as_it_was(prepared: Path, digits_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    params, path = parse_params(digits_fields), Path("profiles/bench.json")
    measure_into(params, path)
    before = path.read_bytes()

    encode, calls = measure.encode_image, itertools.count()

    def interrupted(*image_and_quality: Any) -> bytes:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return encode(*image_and_quality)

    monkeypatch.setattr(measure, "encode_image", interrupted)
    with pytest.raises(Interrupted, match=r"measuring was interrupted; nothing is kept, run it again\.$"):
        measure_into(params, path)
    assert path.read_bytes() == before
    assert {file.suffix for file in Path("profiles").iterdir()} == {".json"}


def test_a_committed_profile_gives_the_same_bytes_every_time(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    params = with_device(digits_fields, profile="bench", edge_profile="bench", slowdown=20)
    assert set(measure_into(params, Path("profiles/bench.json")).backbones) == {KEY}
    runs = []
    for _ in range(2):
        shutil.rmtree(PATHS.root, ignore_errors=True)
        profile.run(params, "camera", tracker)
        runs.append([path.read_bytes() for path in (PATHS.cuts, PATHS.device_profile, PATHS.edge_profile)])
    assert runs[0] == runs[1]
    assert DeviceProfile.load(PATHS.device_profile).slowdown == 20


def test_a_profile_of_another_machine_is_not_extended(prepared: Path, digits_params: Params) -> None:
    path = Path("profiles/xeon.json")
    replace(DeviceProfile.load(path), threads=7).save(path)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=r"profile xeon has .* but this measurement .*; measure into another file"):
        measure_into(digits_params, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"keep": [0.5]}, {"keep": [1, 2]}, {"coder_symbols": [64]}, {"strides": []}, {"speed": 1}, {"keep": 1}, {"warmup": "no"}]
)
def test_a_measuring_plan_that_cannot_be_followed_is_refused(prepared: Path, digits_params: Params, change: dict[str, Any]) -> None:
    Path("profiles/measure.json").write_text(json.dumps({**PLAN, **change}))
    with pytest.raises(ProfileError, match=r"the measuring plan profiles/measure.json is wrong"):
        measure_into(digits_params, Path("profiles/new.json"))
    assert not Path("profiles/new.json").exists()


def test_a_profile_without_this_backbone_says_how_to_get_it(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    with pytest.raises(
        ProfileError, match=r"profile xeon has no tests.tiny:tiny_backbone@3x16x16, only resnet20@3x32x32, resnet8@3x16x16.*`measure`.*measure --into"
    ):
        profile.run(with_device(digits_fields, profile="xeon"), "camera", tracker)
    with pytest.raises(ProfileError, match=r"profile profiles/pi9.json is missing"):
        profile.run(with_device(digits_fields, profile="pi9"), "camera", tracker)


def test_without_data_the_stage_says_what_to_run(workdir: Path, digits_params: Params, tracker: Any) -> None:
    with pytest.raises(CoinferError, match="dvc repro"):
        profile.run(digits_params, "camera", tracker)


def test_the_committed_profile_fits_the_backbones_it_names(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    for name, image_size in (("resnet8", 16), ("resnet20", 32)):
        digits_fields["backbone"]["name"] = name
        digits_fields["data"]["image_size"] = image_size
        found = profile.run(with_device(digits_fields, profile="xeon", edge_profile="xeon"), "camera", tracker)
        assert 0.8 < found["device_sum_over_full"] < 2.5
