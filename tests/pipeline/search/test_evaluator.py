import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.cutting import count_macs, cut_points, split
from models.pruning import prune_head
from pipeline.data import normalise
from pipeline.errors import ModelError, ParamsError
from pipeline.networks import layers_up_to, split_network
from pipeline.params import Codec
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.runtime.images import encode_image
from pipeline.search.candidate import Candidate
from pipeline.search.evaluator import Evaluator
from pipeline.search.problem import Problem
from tests.pipeline.search.toy import deployment, pictures
from tests.tiny import tiny_backbone

EXAMPLE = torch.zeros(1, 3, 16, 16)
SPLIT = Candidate("block1", (("block1", 0.5),), code_channels=4, stride=2, bits=3)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    network, (images, labels) = tiny_backbone(10, 16), pictures(200, 0)
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(25):
        loss = F.cross_entropy(network(normalise(images)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


@pytest.fixture
def make(trained, digits_params):
    cuts = cut_points(trained, EXAMPLE)

    def build(**settings):
        quick = {"codecs": ["uniform"], "codec_steps": 12, "train_images": 128, "batch_size": 32}
        problem = Problem(trained, cuts, digits_params.search.model_copy(update=quick | settings), Codec(), channel_block=1)
        return Evaluator(problem, pictures(200, 0), pictures(60, 1), deployment(), seed=0)

    return build


def test_the_whole_backbone_on_the_device_is_the_reference(make, trained):
    evaluator = make()
    measured = evaluator.measure(Candidate("output"), 1)
    assert measured.accuracy == evaluator.reference_accuracy > 0.5
    assert measured.device_macs == sum(count_macs(trained, EXAMPLE).values())
    assert measured.device_params == sum(parameter.numel() for parameter in trained.parameters())
    assert measured.wire_bytes == measured.link_ms == measured.payload_bits == 0
    largest_activation = 16 * 8 * 16 * 16 // 16
    assert measured.device_memory_mb == pytest.approx(4 * (measured.device_params + largest_activation) / 1e6)


def test_a_split_is_measured_through_symbols_and_coder(make):
    measured = make().measure(SPLIT, 1)
    symbols = 4 * 8 * 8
    assert 0 < measured.payload_bits <= symbols * 3 + 8
    assert measured.payload_bits / 8 + OVERHEAD_BYTES == pytest.approx(measured.frame_bytes)
    assert measured.wire_bytes == pytest.approx(measured.frame_bytes + 52)
    assert measured.total_ms == pytest.approx(measured.device_ms + measured.encode_ms + measured.link_ms + measured.decode_ms + measured.edge_ms)
    assert measured.link_ms > 1 + 8 * measured.wire_bytes / 1e3


def test_a_measurement_depends_on_candidate_and_seed_alone(make):
    evaluator = make()
    first = evaluator.measure(SPLIT, 5)
    evaluator.measure(Candidate("stem.2", (), 2, 1, 1), 6)
    torch.manual_seed(99)
    assert evaluator.measure(SPLIT, 5) == first == make().measure(SPLIT, 5)
    assert evaluator.measure(SPLIT, 6) != first


def test_training_a_split_teaches_it(make):
    untaught, taught = (make(codec_steps=steps).measure(replace(SPLIT, keep=(), bits=6), 1).accuracy for steps in (1, 60))
    assert taught > untaught


def test_batch_norms_know_the_final_weights(make, monkeypatch):
    evaluator = make()
    recalibrated = evaluator.measure(SPLIT, 1).accuracy
    monkeypatch.setattr("pipeline.search.trial_training.recalibrated", lambda network, images, parts: network.eval())
    assert recalibrated > evaluator.measure(SPLIT, 1).accuracy


def test_measuring_leaves_the_backbone_and_the_random_state_alone(make, trained):
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    evaluator = make()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    evaluator.measure(SPLIT, 1)
    evaluator.measure(Candidate("output", (("block2", 0.5),)), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert not trained.training


def test_pruning_makes_the_device_half_smaller_and_faster(make):
    evaluator = make()
    whole, pruned = (evaluator.measure(Candidate("output", keep), 1) for keep in ((), (("block1", 0.5), ("block2", 0.5))))
    assert pruned.device_macs < whole.device_macs
    assert pruned.device_params < whole.device_params
    assert pruned.device_ms < whole.device_ms
    assert pruned.energy_mj < whole.energy_mj


def test_the_macs_of_a_pruned_half_are_those_of_its_layers(make, trained):
    evaluator = make()
    head, _ = split(trained, EXAMPLE, "block1")
    plan = prune_head(head, EXAMPLE, dict(SPLIT.keep), layers_up_to(evaluator.problem.cuts, "block1"), cut_channels=True)[1]
    network = split_network(trained, EXAMPLE, SPLIT, plan)
    assert evaluator.measure(SPLIT, 1).device_macs == sum(count_macs(network.device_half().eval(), EXAMPLE).values())


@pytest.mark.parametrize("codec", ["codebook", "rate"])
def test_every_codec_is_measured_like_the_first(make, codec):
    evaluator = make(codecs=[codec], rate_weights=[0.0, 0.01])
    rates = [0.0, 0.01] if codec == "rate" else [None]
    bits = [evaluator.measure(replace(SPLIT, codec=codec, rate_weight=rate), 1).payload_bits for rate in rates]
    assert 0 < bits[-1] <= bits[0] <= 4 * 8 * 8 * 3 + 8


@pytest.mark.parametrize(("kind", "bits"), [("raw-8bit", None), ("raw-fp32", 32 * 8 * 16 * 16), ("jscc-awgn", 4 * 8 * 8), ("jscc-bec", 8 * 4 * 8 * 8)])
def test_what_is_only_compared_is_offered_and_measured_too(make, kind, bits):
    evaluator = make(codecs=[kind], code_channels=[4], strides=[2], keep=[0.5, 1.0])
    space = evaluator.problem.space()
    raw = kind.startswith("raw")
    assert space.codes["block1"] == (([8], [1]) if raw else ([4], [2]))
    assert bool(space.keep("block1")) != raw, "a feature that crosses as it is keeps its channels"
    channels, strides = space.codes["block1"]
    measured = evaluator.measure(Candidate("block1", (), channels[0], strides[0], 8, codec=kind), 1)
    assert measured.payload_bits == bits if bits else 0 < measured.payload_bits < 8 * 8 * 16 * 16
    assert measured.accuracy > 0.3


def test_vectors_are_cut_where_there_is_nothing_else(digits_params):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    cuts = cut_points(network, EXAMPLE)
    settings = digits_params.search.model_copy(
        update={"codecs": ["rate"], "codec_steps": 12, "train_images": 64, "batch_size": 32, "code_channels": [4], "strides": [1, 2]}
    )

    def build(**changed):
        changed = settings.model_copy(update=changed)
        problem = Problem(network, cuts, changed, Codec(), channel_block=1)
        return Evaluator(problem, pictures(64, 0), pictures(20, 1), deployment(), seed=0)

    with pytest.raises(ParamsError, match=r"search\.strides\.1 is 2, which does not suit vectors, which all cuts give; choose a smaller one"):
        build().problem.space()
    evaluator = build(strides=[1], keep=[1.0])
    codes = evaluator.problem.space().codes
    assert ([4], [1]) in codes.values()
    cut = next(name for name, code in codes.items() if code == ([4], [1]))
    assert 0 < evaluator.measure(Candidate(cut, (), 4, 1, 4, codec="rate", rate_weight=0.0), 1).payload_bits <= 4 * 4 + 8


def test_edge_only_sends_webp(make):
    evaluator = make()
    lossless, coarse = (evaluator.measure(Candidate("input", quality=quality), 1) for quality in (100, 5))
    sizes = [len(encode_image(image.numpy(), "webp", 100)) for image in evaluator.validation[0]]
    assert lossless.payload_bits == pytest.approx(8 * sum(sizes) / len(sizes))
    assert lossless.accuracy == evaluator.reference_accuracy
    assert coarse.wire_bytes < lossless.wire_bytes
    assert lossless.device_params == lossless.device_macs == 0


def test_what_is_offered_can_be_measured(make):
    evaluator = make(codec_steps=1)
    for cut, (channels, strides) in evaluator.problem.space().codes.items():
        keep = tuple((block, ratios[0]) for block, ratios in evaluator.problem.legal_keep(cut).items())
        measured = evaluator.measure(Candidate(cut, keep, channels[-1], strides[-1], 1), 1)
        assert all(math.isfinite(value) for value in measured.to_dict().values())


def test_pruning_a_layer_to_nothing_is_refused(make):
    with pytest.raises(ModelError, match="without channels"):
        make().measure(replace(SPLIT, keep=(("block1", 0.01),)), 1)


def test_features_too_large_to_keep_give_the_same_measurement(make, monkeypatch):
    kept = make().measure(SPLIT, 1)
    monkeypatch.setattr("pipeline.search.trial_training.FEATURE_CACHE_BYTES", 1)
    fresh = make().measure(SPLIT, 1)
    assert (fresh.device_macs, fresh.device_params) == (kept.device_macs, kept.device_params)
    assert fresh.accuracy == pytest.approx(kept.accuracy, abs=0.1)
