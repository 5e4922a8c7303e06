"""The profile stage: cuts with their sizes, and profiles of device and edge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.cutting import CutPoint
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.measure import measure_into
from pipeline.errors import CoinferError, ProfileError
from pipeline.params import Params, parse_params
from pipeline.paths import DATA_CARD, DevicePaths
from pipeline.stages import profile

PATHS = DevicePaths("camera")
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


@pytest.fixture
def prepared(workdir: Path) -> Path:
    DATA_CARD.parent.mkdir(parents=True)
    DATA_CARD.write_text(json.dumps({"classes": [str(digit) for digit in range(10)]}))
    (workdir / "profiles" / "measure.json").write_text(json.dumps(PLAN))
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
    assert [CutPoint.from_dict({key: value for key, value in row.items() if key not in ("elements", "feature_bytes")}).to_dict()["name"] for row in rows]

    device, edge = DeviceProfile.load(PATHS.device_profile), DeviceProfile.load(PATHS.edge_profile)
    (key,) = device.backbones
    assert key == "tests.tiny:tiny_backbone@3x16x16"
    assert (device.slowdown, edge.slowdown) == (3, 1)
    assert device.backbones[key].full.median_ms == pytest.approx(3 * edge.backbones[key].full.median_ms, rel=1e-3)
    assert [block.name for block in edge.backbones[key].blocks] == [row["name"] for row in rows[1:]]
    narrow, whole = edge.backbones[key].blocks[1].points
    assert narrow.macs < 0.6 * whole.macs
    assert edge.backbones[key].blocks[1].points[-1].macs == rows[2]["macs"] - rows[1]["macs"]
    assert set(edge.backbones[key].encoder) == set(edge.backbones[key].decoder) >= {"8x16x16", "16x8x8"}
    assert "cuts.png" in tracker.figures
    assert PATHS.device_profile in tracker.files

    text = PATHS.device_profile.read_text()
    assert str(Path.cwd()) not in text
    assert __import__("platform").node() not in text


def test_a_committed_profile_gives_the_same_bytes_every_time(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    params = with_device(digits_fields, profile="bench", edge_profile="bench", slowdown=20)
    measure_into(params, Path("profiles/bench.json"))
    runs = []
    for _ in range(2):
        shutil.rmtree(PATHS.root, ignore_errors=True)
        profile.run(params, "camera", tracker)
        runs.append([path.read_bytes() for path in (PATHS.cuts, PATHS.device_profile, PATHS.edge_profile)])
    assert runs[0] == runs[1]
    assert DeviceProfile.load(PATHS.device_profile).name == "bench"


def test_a_profile_without_this_backbone_says_how_to_get_it(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    with pytest.raises(ProfileError, match=r"profile xeon has no tests.tiny:tiny_backbone@3x16x16, only resnet20@3x16x16.*`measure`.*measure --into"):
        profile.run(with_device(digits_fields, profile="xeon"), "camera", tracker)
    with pytest.raises(ProfileError, match=r"profile profiles/pi9.json is missing"):
        profile.run(with_device(digits_fields, profile="pi9"), "camera", tracker)


def test_without_data_the_stage_says_what_to_run(workdir: Path, digits_params: Params, tracker: Any) -> None:
    with pytest.raises(CoinferError, match="dvc repro"):
        profile.run(digits_params, "camera", tracker)


def test_the_committed_profile_fits_the_default_backbone(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    digits_fields["backbone"]["name"] = "resnet20"
    for image_size in (16, 32):
        digits_fields["data"]["image_size"] = image_size
        found = profile.run(with_device(digits_fields, profile="xeon", edge_profile="xeon"), "camera", tracker)
        assert 0.8 < found["device_sum_over_full"] < 2.5
