"""What a candidate is predicted to cost, against the network that it describes."""

import itertools
import math

import pytest
import torch
from torch import nn

from models.codec import code_shape
from models.cutting import count_macs, cut_points, split
from models.operations import operations
from pipeline.networks import split_network
from pipeline.params import Codec
from pipeline.search.candidate import Candidate
from pipeline.search.costing import Costing
from pipeline.search.problem import Problem
from tests.pipeline.search.toy import deployment
from tests.tiny import tiny_backbone

EXAMPLE = torch.zeros(1, 3, 16, 16)
SPLIT = Candidate("block1", (("block1", 0.5),), code_channels=4, stride=2, bits=3)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return tiny_backbone(10, 16).eval()


@pytest.fixture
def make(backbone, digits_params):
    def build(kind="rate"):
        search = digits_params.search.model_copy(update={"codecs": [kind]})
        return Costing(Problem(backbone, cut_points(backbone, EXAMPLE), search, Codec(), channel_block=1), deployment(), 10)

    return build


def some_candidates(costing):
    for cut, bits, width in itertools.product(("stem.2", "block1", "down.2", "block2"), (1, 8), (1, 4)):
        for share in (0.5, 1.0):
            keep = tuple((block, share) for block in costing.problem.legal_keep(cut))
            yield Candidate(cut, keep, width, 2, bits, codec="rate", rate_weight=0.1)
    yield from (Candidate("output", tuple((block, share) for block in costing.problem.legal_keep("output"))) for share in (0.5, 0.75, 1.0))


def symbols(costing, candidate):
    return math.prod(code_shape(costing.feature_shape(candidate.cut), candidate.code_channels, candidate.stride))


def test_a_split_costs_what_its_own_halves_compute(make, backbone):
    costing = make()
    network = split_network(backbone, EXAMPLE, SPLIT, costing.problem.plan("block1", dict(SPLIT.keep))).eval()
    symbols = torch.zeros(1, *network.codec.code_shape, dtype=torch.uint8)
    measured, (device, edge) = costing.measurement(SPLIT, 0.5, [20, 21], 1, 1, 1), (costing.deployment.device, costing.deployment.edge)
    computed = operations(network.device_half().eval(), EXAMPLE), operations(network.edge_half().eval(), symbols)
    assert measured.device_ms == pytest.approx(device.image(16).preprocess.median_ms + device.half_ms(computed[0]))
    assert measured.edge_ms == pytest.approx(edge.half_ms(computed[1]))
    assert measured.encode_ms == device.coder_times.encode_ms(symbols.numel())
    assert measured.device_macs == sum(count_macs(network.device_half().eval(), EXAMPLE).values())
    assert measured.frame_bytes == 20.5 + 13
    assert measured.total_ms == pytest.approx(measured.device_ms + measured.encode_ms + measured.link_ms + measured.decode_ms + measured.edge_ms)


def test_the_image_goes_through_the_whole_network_on_the_edge(make, backbone):
    costing = make()
    measured, (device, edge) = costing.measurement(Candidate("input", quality=30), 0.5, [20], 1, 1, 1), (costing.deployment.device, costing.deployment.edge)
    assert measured.edge_ms == pytest.approx(edge.image(16).preprocess.median_ms + edge.half_ms(operations(backbone, EXAMPLE)))
    assert measured.encode_ms == device.image(16).encode_ms("webp", 30)
    assert (measured.device_ms, measured.device_macs) == (0, 0)


def test_the_bound_is_never_below_what_is_measured_with_any_code_up_to_its_uncoded_size(make):
    costing = make()
    for candidate in some_candidates(costing):
        uncoded = 0 if candidate.kind == "device-only" else -(-symbols(costing, candidate) * candidate.bits // 8)
        for payload in {1, uncoded // 2, uncoded, uncoded + 1} - {0} if uncoded else ():
            assert costing.measurement(candidate, 0.5, [payload], 1, 1, 1).total_ms <= costing.bound_ms(candidate)
    whole = Candidate("output")
    assert costing.bound_ms(whole) == costing.measurement(whole, 0.5, [], 1, 1, 1).total_ms


def test_a_pruned_half_is_predicted_to_be_faster(make):
    costing = make()
    for cut in ("block1", "block2"):
        keep = costing.problem.legal_keep(cut)
        whole, half = (Candidate(cut, tuple((block, share) for block in keep), 4, 2, 4) for share in (1.0, 0.5))
        assert costing.bound_ms(half) < costing.bound_ms(whole)


def test_asking_draws_no_random_number_and_changes_no_weight(make, backbone):
    costing, before = make(), [parameter.clone() for parameter in backbone.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for candidate in some_candidates(costing):
        costing.bound_ms(candidate)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "code_channels", "stride"), [("raw-fp32", 8, 1), ("raw-8bit", 8, 1), ("codebook", 4, 2), ("jscc-awgn", 4, 2)])
def test_every_codec_has_costs(make, kind, code_channels, stride):
    candidate = Candidate("block1", (), code_channels, stride, 8, codec=kind)
    costing = make(kind)
    assert bool(costing.measurement(candidate, 0.5, [20], 1, 1, 1).encode_ms) == (kind in ("raw-8bit", "codebook"))
    assert costing.bound_ms(candidate) > 0


def test_an_agent_is_told_of_each_part_that_can_be_pruned(make, backbone):
    costing = make()
    layers = costing.layers("block2")
    assert [layer.name for layer in layers] == list(costing.problem.legal_keep("block2"))
    computed = count_macs(split(backbone, EXAMPLE, "block2")[0], EXAMPLE)
    assert sum(layer.macs for layer in layers) <= sum(computed.values())
    down = next(layer for layer in layers if layer.name.startswith("down"))
    assert (down.kind, down.in_channels, down.out_channels, down.stride, down.kernel, down.weights) == ("conv", 8, 16, 2, 3, 8 * 16 * 9)
    assert costing.feature_shape("block2") == (16, 8, 8)


def test_linear_layers_are_told_apart(digits_params):
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    problem = Problem(network, cut_points(network, EXAMPLE), digits_params.search, Codec(), channel_block=1)
    layers = Costing(problem, deployment(), 10).layers("output")
    assert layers
    assert {layer.kind for layer in layers} == {"fc"}
