"""Inputs that once did harm, and some of those of `benchmarks/runtime_fuzz.py`: whatever comes is answered or refused with a sentence."""

import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.fuzz_targets import TARGETS, Loader
from benchmarks.runtime_fuzz import input_of

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.zip"))
FEW = {"frame": 1500, "stream": 150, "reply": 400, "coder": 400, "loader": 80}


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return Loader(tmp_path_factory.mktemp("loader"))


@pytest.mark.parametrize("path", CORPUS, ids=[path.stem for path in CORPUS])
def test_a_bundle_that_once_did_harm_is_refused(loader, path):
    assert loader.check(path.read_bytes()) == "refused"


@pytest.mark.parametrize("name", FEW)
def test_whatever_comes_is_answered_or_refused(name, tmp_path):
    target, outcomes, checked = TARGETS[name][0](tmp_path), Counter(), 0
    for index in range(FEW[name]):
        data, is_checked = input_of(name, 0, index, target)
        outcomes[target.check(data)] += 1
        checked += is_checked
    target.close()
    assert set(outcomes) == {"answered", "refused"}
    assert checked > FEW[name] / 2 or name == "coder"


@pytest.mark.parametrize("name", FEW)
def test_an_input_is_a_function_of_its_seed_and_index(name, tmp_path):
    target, again = (TARGETS[name][0](tmp_path / each) for each in "ab")
    assert [input_of(name, 3, index, target) for index in range(20)] == [input_of(name, 3, index, again) for index in range(20)]
    assert input_of(name, 3, 0, target) != input_of(name, 4, 0, again)
    for each in (target, again):
        each.close()


def test_most_frames_have_a_checksum_that_fits(tmp_path):
    target, rng = TARGETS["frame"][0](tmp_path), random.Random(0)
    assert sum(target.generate(rng)[1] for _ in range(1000)) > 900
