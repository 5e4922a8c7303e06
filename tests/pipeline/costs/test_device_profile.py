"""A profile on disk: what is refused, what survives, and what it says about images and backbones it was not measured with."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.operations import macs
from pipeline.costs.device_profile import CALL_COLUMNS, DeviceProfile, WholeNetwork, backbone_key
from pipeline.errors import ProfileError
from tests.pipeline.costs.profiles import KEY, exactly, toy_profile, whole

ROOT = Path(__file__).resolve().parents[3]

INPUTS = CALL_COLUMNS.index("inputs")


def test_a_saved_profile_predicts_the_same_and_writes_the_same_bytes(tmp_path: Path) -> None:
    profile = toy_profile()
    profile.save(tmp_path / "toy.json")
    again = DeviceProfile.load(tmp_path / "toy.json")
    assert replace(again, kernels={}, runs=()) == replace(profile, kernels={}, runs=())
    assert again.kernels.keys() == profile.kernels.keys()
    assert [run.calls for run in again.runs] == [run.calls for run in profile.runs]
    assert again.half_ms(whole()) == pytest.approx(profile.half_ms(whole()), rel=1e-3)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "toy.json").read_bytes()


def test_a_profile_is_no_larger_than_its_kernels_need(tmp_path: Path) -> None:
    toy_profile().save(tmp_path / "toy.json")
    text = (tmp_path / "toy.json").read_text()
    assert len(text) < 250 * len(toy_profile().kernels) + 100 * len(toy_profile().runs) + 4000
    assert max(map(len, text.splitlines())) < 1000, "a row a line"


def test_slowdown_multiplies_every_time_and_says_so() -> None:
    plain, slow = toy_profile(), toy_profile().slowed(2).slowed(3)
    assert slow.slowdown == 6
    assert slow.half_ms(whole()) == pytest.approx(6 * plain.half_ms(whole()))
    assert slow.image(16).encode_ms("webp", 100) == pytest.approx(24)
    assert slow.image(16).decode_ms("webp", 100) == pytest.approx(12)
    assert slow.image(16).preprocess.median_ms == pytest.approx(1.5)
    assert slow.coder_times.encode_ms(100) == pytest.approx(6 * plain.coder_times.encode_ms(100))
    measured, slower = plain.network(KEY), slow.network(KEY)
    assert measured is not None
    assert slower is not None
    assert slower.median_ms == pytest.approx(6 * measured.median_ms)
    assert slow.to_dict()["kernels"] == plain.to_dict()["kernels"], "a file holds what was measured"


@pytest.mark.parametrize("profile", [toy_profile(), DeviceProfile.load(ROOT / "profiles/epyc.json")], ids=["toy", "epyc"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_half_is_predicted_to_take_less_than_its_multiply_accumulates_do(profile: DeviceProfile, precision: Any) -> None:
    for operations in (whole(), whole()[:1]):
        least_ms = profile.slowed(3).least_ms(macs(operations), precision)
        assert 0 < least_ms <= profile.slowed(3).half_ms(operations, precision)
        assert profile.least_ms(macs(operations), precision) == pytest.approx(least_ms / 3)


def test_a_saved_slower_device_is_as_slow_when_loaded(tmp_path: Path) -> None:
    toy_profile().slowed(5).save(tmp_path / "slow.json")
    assert DeviceProfile.load(tmp_path / "slow.json").image(16).preprocess.median_ms == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: p.update(schema_version=1), "schema version 1, this program reads 2; measure it again"),
        (lambda p: p.pop("schema_version"), "schema version None"),
        (lambda p: p.pop("threads"), "lacks threads"),
        (lambda p: p.pop("kernels"), "lacks kernels"),
        (lambda p: p["kernels"].pop("rows"), "lacks rows"),
        (lambda p: p["images"]["16"].pop("preprocess"), "lacks preprocess"),
        (lambda p: p["networks"][KEY].pop("macs"), "lacks macs"),
        (lambda p: p["kernels"]["rows"][0].__setitem__(-3, math.nan), r"kernel 0 \(.*\) is nan"),
        (lambda p: p["kernels"]["rows"][1].__setitem__(-1, math.inf), r"kernel 1 \(.*\) is inf"),
        (lambda p: p["kernels"]["rows"][2].__setitem__(-3, -0.1), r"kernel 2 \(.*\) is -0.1"),
        (lambda p: p["kernels"]["rows"][2].__setitem__(slice(-3, None), [0, 0, 0]), r"kernel 2 \(.*\) takes no time"),
        (lambda p: p["kernels"]["rows"][3].pop(), "kernel 3 has"),
        (lambda p: p["kernels"]["columns"].reverse(), "kernels has the columns high_ms"),
        (lambda p: p["runs"]["rows"][0].__setitem__(1, "fast"), "run 0 is 'fast'"),
        (lambda p: p["runs"]["rows"][0].__setitem__(1, 1e9), "run 0 is .* not a median and the quartiles around it"),
        (lambda p: p["runs"]["rows"][0].__setitem__(0, [10**6]), "run 0 calls kernels"),
        (lambda p: p["images"]["16"]["encode"]["webp"].update({"30": [1, 1]}), r"images 16 encode webp 30 is not \[median, low, high\]"),
        (lambda p: p["images"]["16"]["decode"].update(webp={}), "images 16 decode webp has no quality"),
        (lambda p: p["networks"][KEY].update(fp32=[1, 1, -1]), "network .* fp32 is -1"),
        (lambda p: p["coder"].update(encode_fixed_ms="fast"), "coder.encode_fixed_ms is 'fast'"),
        (lambda p: p["coder"].update(decode_fixed_ms=True), "coder.decode_fixed_ms is True"),
        (lambda p: p.update(images=[]), "is wrong"),
        (lambda p: p.update(slowdown=-1), "slowdown is -1"),
        (lambda p: p.update(slowdown=0), "slowdown is 0"),
        (lambda p: p.update(threads=0), "threads is 0, not a whole number of 1 or more"),
        (lambda p: p.update(threads=1.5), "threads is 1.5"),
        (lambda p: p.update(channel_block=0), "channel_block is 0"),
        (lambda p: p.update(nchwc_block=-8), "nchwc_block is -8"),
        (lambda p: p["kernels"]["rows"][4].__setitem__(INPUTS, []), r"kernel 4 \(.*\) has a shape that is not .* or no inputs"),
        (lambda p: p["kernels"]["rows"][4].__setitem__(INPUTS, "1x3x16x16"), r"kernel 4 \(.*\) has a shape"),
        (lambda p: p["kernels"]["rows"][4].__setitem__(INPUTS, ["ab"]), r"kernel 4 \(.*\) has a shape"),
        (lambda p: p["kernels"]["rows"][4].__setitem__(INPUTS + 1, [1, "wide"]), r"kernel 4 \(.*\) has a shape"),
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
    assert "profile --into" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\x00"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "toy.json").write_text(text)
    with pytest.raises(ProfileError, match=r"toy.json .*profile --into"):
        DeviceProfile.load(tmp_path / "toy.json")


def test_images_of_a_size_not_measured_take_times_in_proportion_to_their_pixels() -> None:
    profile = toy_profile()
    assert profile.image(32).preprocess.median_ms == pytest.approx(1)
    assert profile.image(64).preprocess.median_ms == pytest.approx(4)
    assert profile.image(8).encode_ms("png", 100) == pytest.approx(0.5)
    assert profile.image(24).encode_ms("webp", 100) == pytest.approx(4 * (24 / 16) ** 2)
    with pytest.raises(ProfileError, match="profile toy has no image sizes"):
        replace(profile, images={}).image(16)


def test_lossy_qualities_lie_between_those_measured_and_lossless_webp_is_another_coder() -> None:
    image = toy_profile().image(16)
    assert [image.encode_ms("webp", quality) for quality in (10, 30, 60, 90, 95, 100)] == pytest.approx([1, 1, 1.3, 1.6, 1.6, 4])
    assert image.encode_ms("jpeg", 75) == pytest.approx(0.3)


def test_a_backbone_that_was_not_measured_is_predicted_with_a_remark() -> None:
    profile = toy_profile()
    assert profile.remark(KEY, 1_000_000) is None
    assert profile.remark(KEY, 1_030_000) is None, "a classifier with other classes"
    remark = profile.remark(backbone_key("resnet20", 32), 40_000_000)
    assert remark is not None
    assert f"was measured with only {KEY}, not with resnet20@3x32x32, so its predictions are less sure" in remark
    assert "profile --into" in remark
    other = profile.remark(KEY, 2_000_000)
    assert other is not None
    assert "of 1000000 MACs where this one has 2000000" in other
    assert "measured with no backbone" in (replace(profile, networks={}).remark(KEY, 1) or "")


def test_a_profile_grows_by_backbones_and_sizes_of_the_same_machine_only() -> None:
    mine, key = toy_profile(), backbone_key("toy", 32)
    fewer = dict(list(mine.kernels.items())[:5])
    other = replace(mine, name="new", networks={key: WholeNetwork(5, {"fp32": exactly(1)})}, images={64: mine.image(64)}, kernels=fewer, runs=mine.runs[:2])
    both = mine.merged(other)
    assert set(both.networks) == {KEY, key}
    assert set(both.images) == {16, 32, 64}
    assert both.kernels == mine.kernels
    assert set(both.runs) == set(mine.runs)
    assert both.name == "toy"
    with pytest.raises(ProfileError, match="threads 1 but this measurement 2; measure into another file"):
        mine.merged(replace(other, threads=2))
    with pytest.raises(ProfileError, match="coder c but this measurement python; measure into another file"):
        mine.merged(replace(other, coder=replace(other.coder, implementation="python")))


def test_what_is_kept_for_one_size_is_all_that_this_size_needs() -> None:
    profile = replace(toy_profile(), networks={**toy_profile().networks, backbone_key("toy", 132): WholeNetwork(5, {})})
    assert (set(profile.only(16).images), set(profile.only(16).networks)) == ({16}, {KEY})
    assert (set(profile.only(24).images), set(profile.only(24).networks)) == ({24}, set())
    assert profile.slowed(3).only(24).image(24) == profile.only(24).slowed(3).image(24)
    assert profile.only(16).kernels == profile.kernels
