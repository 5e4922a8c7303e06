import numpy as np
import pytest
import torch

from models.backbones import build_backbone
from models.cutting import cut_points
from pipeline.errors import ParamsError
from pipeline.networks import codec_spec
from pipeline.params import Codec
from pipeline.search.problem import Problem
from tests.tiny import tiny_backbone

EXAMPLE = torch.zeros(1, 3, 16, 16)


@pytest.fixture
def problem(digits_params):
    def build(codec=None, **settings):
        network = tiny_backbone(10, 16)
        search = digits_params.search.model_copy(update={"codecs": ["uniform"]} | settings)
        return Problem(network, cut_points(network.eval(), EXAMPLE), search, codec or Codec(), channel_block=1)

    return build


def test_what_pools_a_map_to_a_vector_is_no_cut_for_a_codec(digits_params):
    network = tiny_backbone(10, 16).eval()
    cuts = cut_points(network, EXAMPLE, "all")
    assert any(len(cut.shape) == 1 for cut in cuts[1:-1])
    settings = digits_params.search.model_copy(update={"code_channels": [4], "strides": [1]})
    codes = Problem(network, cuts, settings, Codec(), channel_block=1).space().codes
    assert set(codes) == {cut.name for cut in cuts[1:-1] if len(cut.shape) == 3}


def test_noise_that_is_none_of_the_channel_is_named(problem):
    with pytest.raises(ParamsError, match=r"codec\.noise: codec jscc-bsc: noise is 0\.1 to 0\.9; give two probabilities above 0"):
        problem(codec=Codec(noise=[0.1, 0.9]), codecs=["uniform", "jscc-bsc"]).space()


def test_what_of_the_settings_comes_to_nothing_is_said(digits_params, problem):
    network = build_backbone("shufflenet_v2_x0_5", 10, 32).eval()
    cuts = cut_points(network, torch.zeros(1, 3, 32, 32))

    def remarks(points, keep):
        settings = digits_params.search.model_copy(update={"train_images": 8, "keep": keep, "strides": [1], "code_channels": [2]})
        return Problem(network, points, settings, Codec(), channel_block=1).remarks()

    said = "search.keep comes to nothing for the device halves that end at stage2.0, output: this device half cannot be pruned: it shuffles channels"
    few = [point for point in cuts if point.name in ("input", "maxpool", "stage2.0", "output")]
    assert [remark[: len(said)] for remark in remarks(few, [1.0, 0.5])] == [said]
    assert not remarks(few, [1.0])
    assert remarks([cuts[0], cuts[-1]], [1.0])[0].startswith("no cut gives a map or vector that a codec fits")
    assert not problem(keep=[0.5]).remarks()


def test_only_what_can_run_is_offered(problem):
    space = problem(keep=[0.05, 0.5], code_channels=[2, 12], strides=[1, 4, 8]).space()
    assert space.codes == {"stem.2": ([2], [1, 4, 8]), "block1": ([2], [1, 4, 8]), "down.2": ([2, 12], [1, 4]), "block2": ([2, 12], [1, 4])}
    assert space.keep("stem.2") == {"stem.0": (0.5, 1.0)}, "a codec follows, so the cut's own channels may go"
    assert space.keep("block1") == {"stem.0": (0.5, 1.0), "block1.conv1": (0.5, 1.0)}, "0.05 of 8 channels is none"
    assert list(space.keep("output")) == ["stem.0", "block1.conv1", "down.0", "block2.conv1"]
    assert space.keep("output")["block2.conv1"] == (0.05, 0.5, 1.0)


def test_blocks_may_go_where_a_shortcut_goes_past_and_take_their_groups_along(problem):
    built = problem(keep=[0.0, 0.5, 1.0])
    space = built.space()
    assert space.keep("block2") == {
        "stem.0": (0.5, 1.0),
        "block1": (0.0, 1.0),
        "block1.conv1": (0.5, 1.0),
        "down.0": (0.5, 1.0),
        "block2": (0.0, 1.0),
        "block2.conv1": (0.5, 1.0),
    }
    assert space.inside("block2") == {"block1": {"block1.conv1"}, "block2": {"block2.conv1"}}
    assert space.inside("stem.2") == {}
    dropped = dict(space.suggest_at("block1", lambda name, choices: choices[0]).keep)
    assert dropped == {"stem.0": 0.5, "block1": 0.0}
    assert built.plan("block1", dropped) == built.plan("block1", dropped | {"block1.conv1": 0.5}), "asking on would be for nothing"


def test_candidates_of_other_fractions_are_other_networks(digits_params):
    network = tiny_backbone(10, 16).eval()
    settings = digits_params.search.model_copy(update={"keep": [0.2, 0.4, 0.5, 0.9, 1.0]})
    built = Problem(network, cut_points(network, EXAMPLE), settings, Codec(), channel_block=4)
    assert built.space().keep("output") == {"stem.0": (0.5, 1.0), "block1.conv1": (0.5, 1.0), "down.0": (0.2, 0.5, 1.0), "block2.conv1": (0.2, 0.5, 1.0)}
    found = [built.plan("output", {group: ratio}) for group, ratios in built.space().keep("output").items() for ratio in ratios[:-1]]
    assert len({plan.to_json() for plan in found}) == len(found)


def test_the_codecs_of_a_cut_are_those_that_its_candidates_have(problem):
    built = problem(codecs=["uniform", "rate", "multi-rate"], rate_weights=[0.0, 0.1], bits=[2, 4], strides=[1, 2], code_channels=[4, 8])
    rng, specs = np.random.default_rng(0), built.specs("block1")
    proposed = {built.space().suggest_at("block1", lambda _, choices: choices[rng.integers(len(choices))]) for _ in range(600)}
    assert {codec_spec(candidate, built.codec) for candidate in proposed} == set(specs)
    assert len(specs) == len(set(specs)) == 4 * (2 + 2 * 2 + 1)
    assert {spec.points for spec in specs if spec.code_channels == 4} == {(), ((4, 4), (2, 3), (1, 2))}
    assert problem(codecs=["raw-8bit"]).specs("block1") == [], "which has no weights"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"code_channels": [4, 512]}, "search.code_channels.1 is 512, but no cut of 2x2 or more has over 16 channels; choose at most that"),
        ({"strides": [32]}, "search.strides.0 is 32, which leaves less than 2x2 of the feature at every cut; choose a smaller one"),
        ({"keep": [1.0, 0.01]}, "search.keep.1 is 0.01, which suits no group: keep ratio 0.01 of block"),
    ],
)
def test_what_fits_nowhere_is_named(problem, settings, words):
    with pytest.raises(ParamsError, match=words):
        problem(**settings).space()
