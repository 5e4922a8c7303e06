from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.search.candidate import INPUT, OUTPUT, Candidate
from pipeline.search.simple import random_pick
from pipeline.search.space import Space
from tests.pipeline.search.fakes import SEVERAL, SPACE

RATE = Space(SPACE.codes, SPACE.bits, SPACE.images, SPACE.keep, ("rate",), (0.1, 0.2), ("fp32", "int8"), inside=SPACE.inside)


@given(st.integers(0, 2**31), st.sampled_from([SPACE, RATE, SEVERAL]))
def test_the_choices_of_a_candidate_give_it_again(seed, space):
    candidate = space.suggest(random_pick(seed))
    choices = space.choices(candidate)
    assert space.suggest(lambda name, _: choices[name]) == candidate
    assert "image" not in choices


def test_the_choices_of_a_baseline_give_it_again():
    for baseline in SPACE.baselines():
        choices = SPACE.choices(baseline)
        assert SPACE.suggest(lambda name, _, choices=choices: choices[name]) == baseline


def test_baselines_are_the_device_alone_and_every_image():
    space = Space({}, (), [("webp", 100), ("jpeg", 60), ("png", 100)], lambda cut: {})
    assert [baseline.label() for baseline in space.baselines()] == ["device-only", "WebP lossless", "JPEG q60", "PNG lossless"]
    assert INPUT not in space.cuts, "which leaves nothing of it to search for"


def test_parameters_are_asked_for_in_order_of_execution():
    asked = []

    def pick(name, choices):
        asked.append(name)
        return choices[-1]

    RATE.suggest_at("late", pick)
    assert asked == ["keep stem", "keep block1", "keep block1.conv1", "code_channels", "stride", "bits", "rate_weight", "precision"]


@pytest.mark.parametrize(
    ("codec", "more"), [("uniform", ["bits"]), ("rate", ["bits", "rate_weight"]), ("multi-rate", []), ("jscc-awgn", [])], ids=SEVERAL.codecs
)
def test_a_codec_is_asked_for_where_there_are_several_and_then_only_what_it_has(codec, more):
    asked = []

    def pick(name, choices):
        asked.append(name)
        return codec if name == "codec" else choices[-1]

    candidate = SEVERAL.suggest_at("late", pick)
    assert asked == ["keep stem", "keep block1", "keep block1.conv1", "codec", "code_channels", "stride", *more]
    assert (candidate.codec, candidate.bits) == (codec, 4 if more else 8)
    assert candidate.points == (((8, 4), (4, 2)) if codec == "multi-rate" else ())


def test_every_code_of_every_kind_is_proposed_once():
    rng = np.random.default_rng(0)
    proposed = {SEVERAL.suggest_at("early", lambda name, choices: choices[rng.integers(len(choices))]) for _ in range(3000)}
    assert Counter(candidate.codec for candidate in proposed) == {"uniform": 6 * 3, "rate": 6 * 3 * 2, "multi-rate": 6, "jscc-awgn": 6}


def test_a_block_that_is_dropped_has_no_groups_to_ask_for_and_each_network_one_candidate():
    def pick(name, choices):
        assert name != "keep block1.conv1"
        return 0.0 if name == "keep block1" else choices[-1]

    assert SPACE.suggest_at(OUTPUT, pick) == Candidate(OUTPUT, (("block1", 0.0),))
    rng = np.random.default_rng(0)
    proposed = {SPACE.suggest_at(OUTPUT, lambda name, choices: choices[rng.integers(len(choices))]) for _ in range(500)}
    assert len(proposed) == 2 * (1 + 3) * 2


@pytest.mark.parametrize("weight", [0.1, 0.2])
def test_rate_weights_belong_to_the_rate_codec(weight):
    candidate = RATE.suggest_at("early", lambda name, choices: weight if name == "rate_weight" else choices[0])
    assert (candidate.codec, candidate.rate_weight, candidate.precision) == ("rate", weight, "fp32")
