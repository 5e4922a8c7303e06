"""A profile on disk: what is refused, what survives, and what fits which backbone."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.costs.device_profile import DeviceProfile, backbone_key, interpolate_ms
from pipeline.errors import ProfileError
from tests.pipeline.costs.profiles import KEY, point, toy_profile


@dataclass(frozen=True)
class Cut:
    name: str
    macs: int


CUTS = [Cut("input", 0), Cut("stem", 1000), Cut("body", 3000), Cut("output", 3160)]


def test_a_saved_profile_comes_back_the_same_and_writes_the_same_bytes(tmp_path: Path) -> None:
    toy_profile().save(tmp_path / "toy.json")
    again = DeviceProfile.load(tmp_path / "toy.json")
    assert again == toy_profile()
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "toy.json").read_bytes()


def test_between_measured_points_times_are_interpolated_and_beyond_them_held() -> None:
    points = [point(100, 1), point(300, 2)]
    assert [interpolate_ms(points, macs) for macs in (0, 100, 200, 300, 900)] == [1, 1, 1.5, 2, 2]


def test_a_dropped_block_takes_no_time() -> None:
    backbone = toy_profile().backbone(KEY)
    macs = {"stem": 1000.0, "body": 2000.0}
    whole, narrow, dropped = (backbone.half_ms(macs | {"body": body}) for body in (2000.0, 1.0, 0.0))
    assert dropped < narrow < whole
    assert dropped == backbone.half_ms({"stem": 1000.0})


def test_the_profile_reports_what_cutting_costs_the_runtime() -> None:
    assert toy_profile().to_dict()["backbones"][KEY]["sum_over_full"] == pytest.approx(4 / 3, abs=1e-4)


def test_slowdown_multiplies_every_time_and_says_so() -> None:
    slow = toy_profile().slowed(2).slowed(3)
    assert slow.slowdown == 6
    assert slow.backbones[KEY].full == point(3160, 21)
    assert slow.backbones[KEY].webp_encode_ms(100) == pytest.approx(24)
    assert slow.coder.encode_ms(100) == pytest.approx(6 * toy_profile().coder.encode_ms(100))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: p.update(schema_version=2), "schema version 2, this program reads 1; measure it again"),
        (lambda p: p.pop("threads"), "lacks threads"),
        (lambda p: p["backbones"][KEY].pop("full"), "lacks full"),
        (lambda p: p["backbones"][KEY]["blocks"][0]["points"][0].__setitem__(1, math.nan), "block stem is nan"),
        (lambda p: p["backbones"][KEY]["blocks"][1]["points"][0].__setitem__(1, -0.1), "block body is -0.1"),
        (lambda p: p["backbones"][KEY]["blocks"][0].update(points=[]), "block stem is not a list"),
        (lambda p: p["backbones"][KEY]["blocks"][0]["points"].reverse(), "block stem is not in order"),
        (lambda p: p["backbones"][KEY].update(full=[3160, 0.5, 0.5, 0.5]), "full takes no longer"),
        (lambda p: p["backbones"][KEY].update(webp_encode={}), "webp_encode has no quality"),
        (lambda p: p["coder"].update(encode_fixed_ms="fast"), "coder.encode_fixed_ms is 'fast'"),
        (lambda p: p.update(backbones=[]), "is wrong"),
    ],
)
def test_a_broken_profile_is_refused_with_the_place_named(tmp_path: Path, break_it: Callable[[Any], Any], message: str) -> None:
    fields = json.loads(json.dumps(toy_profile().to_dict()))
    break_it(fields)
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ProfileError, match=message) as caught:
        DeviceProfile.load(path)
    assert "toy.json" in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\x00"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "toy.json").write_text(text)
    with pytest.raises(ProfileError, match=r"toy.json .*measure"):
        DeviceProfile.load(tmp_path / "toy.json")


def test_the_cuts_of_the_measured_backbone_fit_also_with_other_classes() -> None:
    toy_profile().check_cuts(KEY, CUTS)  # type: ignore[arg-type]
    toy_profile().check_cuts(KEY, [*CUTS[:-1], Cut("output", 3200)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([*CUTS[:2], Cut("other", 3000), CUTS[3]], "other search.cuts: they differ in body, other; set"),
        (CUTS[:-1], "they differ in output"),
        ([CUTS[0], Cut("body", 1000), Cut("stem", 3000), CUTS[3]], "they differ in their order"),
        ([CUTS[0], Cut("stem", 2000), Cut("body", 4000), Cut("output", 4160)], "block stem had 1000 MACs there and has 2000 here"),
    ],
)
def test_another_backbone_under_the_same_name_is_refused(cuts: list[Cut], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        toy_profile().check_cuts(KEY, cuts)  # type: ignore[arg-type]


def test_a_profile_grows_by_backbones_of_the_same_machine_only() -> None:
    mine, other = toy_profile(), replace(toy_profile(), name="new", backbones={backbone_key("toy", 32): toy_profile().backbones[KEY]})
    assert set(mine.merged(other).backbones) == {KEY, "toy@3x32x32"}
    assert mine.merged(other).name == "toy"
    assert set(mine.merged(other).only(KEY).backbones) == {KEY}
    with pytest.raises(ProfileError, match="threads 1 but this measurement 2; measure into another file"):
        mine.merged(replace(other, threads=2))
