"""The profile stage: cuts with their sizes, and profiles of device and edge."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.cutting import cut_points
from pipeline.costs.device_profile import DeviceProfile
from pipeline.errors import CoinferError, ProfileError
from pipeline.params import Params, parse_params
from pipeline.paths import DATA_CARD, STATE, DevicePaths
from pipeline.stages import profile
from tests.pipeline.costs.profiles import toy_profile
from tests.tiny import tiny_backbone

PATHS = DevicePaths("camera")
KEY = "tests.tiny:tiny_backbone@3x16x16"


@pytest.fixture
def prepared(workdir: Path) -> Path:
    DATA_CARD.parent.mkdir(parents=True)
    DATA_CARD.write_text(json.dumps({"classes": [str(digit) for digit in range(10)]}))
    return workdir


def with_device(fields: dict[str, Any], **device: Any) -> Params:
    fields["devices"]["camera"] |= device
    return parse_params(fields)


def test_this_machine_is_measured_for_a_backbone_nobody_profiled(
    prepared: Path, digits_fields: dict[str, Any], tracker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = profile.run(with_device(digits_fields, slowdown=3), "camera", tracker)
    assert capsys.readouterr().err == "", "it knows its own backbone"

    rows = json.loads(PATHS.cuts.read_text())
    assert [row["name"] for row in rows][:: len(rows) - 1] == ["input", "output"]
    assert rows[0]["feature_bytes"] == 3 * 16 * 16
    assert rows[1]["feature_bytes"] == 4 * rows[1]["elements"]

    device, edge = DeviceProfile.load(PATHS.device_profile), DeviceProfile.load(PATHS.edge_profile)
    assert list(device.networks) == list(edge.networks) == [KEY]
    assert set(device.networks[KEY].ms) == {"fp32", "int8"}
    assert device.networks[KEY].macs == rows[-1]["macs"]
    assert (device.slowdown, edge.slowdown) == (3, 1)
    assert device.image(16).preprocess.median_ms == pytest.approx(3 * edge.image(16).preprocess.median_ms, rel=1e-3)
    assert set(device.images) == {16}
    assert found["device_full_ms"] > found["edge_full_ms"] > 0
    assert found["device_predicted_over_measured"] > 0
    assert tracker.params["backbone_in_profiles"]
    assert "cuts.png" in tracker.figures
    assert PATHS.device_profile in tracker.files
    assert not list((STATE / "profiling").glob("*"))

    text = PATHS.device_profile.read_text()
    assert str(Path.cwd()) not in text
    assert platform.node() not in text


def test_cuts_through_blocks_need_no_profile_of_their_own(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    toy_profile().save(Path("profiles/toy.json"))
    digits_fields["search"]["cuts"] = "all"
    profile.run(with_device(digits_fields, profile="toy", edge_profile="toy"), "camera", tracker)
    names = [row["name"] for row in json.loads(PATHS.cuts.read_text())]
    assert names == [cut.name for cut in cut_points(tiny_backbone(num_classes=10, image_size=16), torch.zeros(1, 3, 16, 16), "all")]


def test_a_committed_profile_gives_the_same_bytes_every_time(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    toy_profile().save(Path("profiles/toy.json"))
    params = with_device(digits_fields, profile="toy", edge_profile="toy", slowdown=20)
    runs = []
    for _ in range(2):
        shutil.rmtree(PATHS.root, ignore_errors=True)
        profile.run(params, "camera", tracker)
        runs.append([path.read_bytes() for path in (PATHS.cuts, PATHS.device_profile, PATHS.edge_profile)])
    assert runs[0] == runs[1]
    assert DeviceProfile.load(PATHS.device_profile).slowdown == 20


def test_a_profile_without_this_backbone_predicts_it_and_says_that_this_is_less_sure(
    prepared: Path, digits_fields: dict[str, Any], tracker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_profile().save(Path("profiles/toy.json"))
    digits_fields["backbone"]["name"] = "resnet8"
    digits_fields["data"]["image_size"] = 24
    found = profile.run(with_device(digits_fields, profile="toy", edge_profile="toy"), "camera", tracker)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"profile camera: profile toy was measured with only {KEY}, not with resnet8@3x24x24, so its predictions are less sure" in said
    assert "profile --into" in said
    assert not tracker.params["backbone_in_profiles"]
    assert found["device_full_ms"] > 0
    assert "device_predicted_over_measured" not in found
    assert set(DeviceProfile.load(PATHS.device_profile).images) == {24}


def test_a_missing_or_outdated_profile_is_refused(prepared: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    with pytest.raises(ProfileError, match=r"profile profiles/pi9.json is missing.*`measure`.*profile --into"):
        profile.run(with_device(digits_fields, profile="pi9"), "camera", tracker)
    Path("profiles/old.json").write_text('{"schema_version": 1}')
    with pytest.raises(ProfileError, match=r"profile profiles/old.json has schema version 1, this program reads 2; measure it again with .*profile --into"):
        profile.run(with_device(digits_fields, profile="old"), "camera", tracker)
    assert not PATHS.device_profile.exists()


def test_without_data_the_stage_says_what_to_run(workdir: Path, digits_params: Params, tracker: Any) -> None:
    with pytest.raises(CoinferError, match="dvc repro"):
        profile.run(digits_params, "camera", tracker)
