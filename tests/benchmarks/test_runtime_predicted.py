"""What would make a prediction look better or worse than it is."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.results_file import ROOT
from benchmarks.runtime_predicted import RTT_MS, SPACE, Choice, errors, figures, measure, pinned
from models.backbones import build_backbone
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.link import Link, wire_bytes
from pipeline.runtime.device import PARTS
from pipeline.search.candidate import INPUT, OUTPUT, Candidate

COUNT = 3


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Untrained weights, flat pictures to train and validate with, and noise to test with, of which WebP makes far larger files."""
    folder, random = tmp_path_factory.mktemp("example"), np.random.default_rng(0)
    for number in range(10):
        for split, shape in (("train", (1, 1, 3)), ("test", (32, 32, 3))):
            place = folder / "data" / split / f"class{number}"
            place.mkdir(parents=True)
            for name in "abcdef":
                pixels = np.broadcast_to(random.integers(0, 256, shape, dtype=np.uint8), (32, 32, 3))
                Image.fromarray(np.ascontiguousarray(pixels)).save(place / f"{name}.png")
    (folder / "weights").mkdir()
    torch.manual_seed(0)
    save_file(build_backbone("resnet20", 10, 32).state_dict(), folder / "weights/resnet20-cifar10jpeg.safetensors")
    return folder


@pytest.fixture(scope="module")
def raw(example):
    split = Candidate("layer3.1", code_channels=4, stride=2, bits=2)
    choices = [Choice(split), Choice(Candidate(OUTPUT)), Choice(Candidate(INPUT, quality=50, image_format="webp"))]
    space = SPACE.model_copy(update={"codec_steps": 1, "batch_size": 10})
    profile = DeviceProfile.load(ROOT / "profiles/epyc.json")
    return measure(example, profile=profile, choices=choices, rates_mbps=[0.5], slowdowns=[2.0], visits=1, images=COUNT, space=space)


def test_what_is_measured_goes_over_the_link_and_is_the_whole_time(raw):
    for place, sends in zip(raw["places"], (True, False, True), strict=True):
        whole_ms, total_ms = (np.array(place["measured_ms"][name]) for name in ("whole_ms", "total_ms"))
        assert len(whole_ms) == COUNT
        assert (whole_ms >= total_ms - 0.01).all()
        link = Link(place["rate_mbps"], RTT_MS)
        least_ms = np.array([link.transmit_ms(wire_bytes(count)) + link.rtt_ms if sends else 0 for count in place["frame_bytes"]])
        assert (np.array(place["measured_ms"]["link_ms"]) >= least_ms).all()
        assert place["predicted_ms"]["total_ms"] == pytest.approx(sum(place["predicted_ms"][part] for part in PARTS[:-1]), abs=1e-3)


def test_the_prediction_knows_nothing_of_the_pictures_that_are_measured(raw):
    *_, image = raw["places"]
    assert 0 < image["expected_frame_bytes"] < min(image["frame_bytes"]) / 2


def test_processes_start_on_the_core_and_the_others_are_ours_again():
    before = os.sched_getaffinity(0)
    with pinned(max(before)):
        found = subprocess.run([sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"], capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(max(before))]
    assert os.sched_getaffinity(0) == before


def place(candidate, predicted_ms, whole_ms):
    measured = {"whole_ms": whole_ms, "total_ms": [1000.0]}
    return {"candidate": candidate, "rate_mbps": 1.0, "slowdown": 10.0, "predicted_ms": {"total_ms": predicted_ms}, "measured_ms": measured}


def test_errors_are_relative_to_the_median_measured_and_have_no_sign():
    places = [place(0, 90.0, [100.0, 100.0, 900.0]), place(0, 130.0, [100.0]), place(1, 100.0, [80.0, 100.0, 120.0])]
    assert errors(places) == pytest.approx([0.1, 0.3, 0.0])
    found = figures({"candidates": [{"label": "one"}, {"label": "two"}], "rtt_ms": 10.0, "places": places})
    assert (found["predicted_error_median"]["value"], found["predicted_error_median"]["n"]) == (pytest.approx(0.1), 3)
    assert found["predicted_error_p90"]["value"] == pytest.approx(0.26)
    assert found["predicted_error_median.1"]["value"] == pytest.approx(0.2)
    assert found["predicted_error_median.2"]["value"] == pytest.approx(0)
