"""The supernet and the evaluator on it, on the tiny backbone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.codec import UniformCodec
from models.coinference import CoInference
from models.cutting import cut_points, split
from models.pruning import prune_head
from pipeline.data import normalise
from pipeline.errors import CoinferError, ModelError
from pipeline.inference import outputs, predict_logits
from pipeline.networks import layers_up_to
from pipeline.params import Codec
from pipeline.params import Supernet as Settings
from pipeline.search.candidate import Candidate
from pipeline.search.evaluator import Evaluator
from pipeline.search.problem import Problem
from pipeline.search.supernet import SplitSupernet, Supernet, prunable_cuts, weights_file
from pipeline.search.supernet_training import BodyLesson, SplitLesson, Taught, narrowest
from pipeline.training import fit, weights_bytes
from tests.pipeline.search.toy import deployment, pictures
from tests.tiny import tiny_backbone

EXAMPLE = torch.zeros(1, 3, 16, 16)
CUT = "block1"
WHOLE = Candidate(CUT, (), code_channels=8, stride=2, bits=3)
PRUNED = replace(WHOLE, keep=(("block1", 0.5), ("stem.2", 0.5)))
OUTPUT = Candidate("output", (("block1", 0.5), ("block2", 0.5)))
SETTINGS = Settings(epochs=16, batch_size=40, learning_rate=0.01, precision="fp32")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    network, (images, labels) = tiny_backbone(10, 16), pictures(200, 0)
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(40):
        loss = F.cross_entropy(network(normalise(images)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


def problem_of(network, params, **settings):
    sizes = {"codecs": ["uniform"], "code_channels": [2, 8], "bits": [1, 3], "strides": [1, 2], "keep": [0.5, 1.0]}
    search = params.search.model_copy(update=sizes | {"codec_steps": 60, "train_images": 200, "batch_size": 32} | settings)
    return Problem(network, cut_points(network, EXAMPLE), search, Codec(), channel_block=1)


def train(problem, settings=SETTINGS):
    """What the stage does, for one cut."""
    data, cuts = pictures(200, 0), prunable_cuts(problem)
    known, body = outputs(problem.backbone, data[0]), copy.deepcopy(problem.backbone)
    options = {"epochs": settings.epochs, "checkpoint_dir": None, "threads": 1, "precision": "fp32", "log": lambda row: None}
    fit(BodyLesson(problem, body, cuts, settings), Taught(problem, data, known, settings, 0), name="body", **options)
    torch.manual_seed(0)
    network, head = SplitSupernet(problem, CUT), split(copy.deepcopy(body), EXAMPLE, CUT)[0]
    fit(SplitLesson(problem, CUT, network, head, settings), Taught(problem, data, known, settings, 0, CUT), name=CUT, **options)
    return Supernet(problem, body.eval(), {CUT: network.eval()})


@pytest.fixture(scope="module")
def supernet(trained, module_params):
    return train(problem_of(trained, module_params))


@pytest.fixture(scope="module")
def module_params():
    import yaml

    from pipeline.params import parse_params
    from tests.conftest import ROOT

    return parse_params(yaml.safe_load((ROOT / "params.yaml").read_text()))


@pytest.fixture
def evaluator(supernet):
    problem = supernet.problem
    return Evaluator(problem, pictures(200, 0), pictures(100, 1), deployment(), 0, supernet)


def test_every_member_of_a_short_training_classifies_about_as_well_as_a_codec_trained_alone(supernet, evaluator):
    """None has collapsed, the narrowest least of all: chance is .1."""
    alone = Evaluator(supernet.problem, pictures(200, 0), pictures(100, 1), deployment(), 0)
    found = {}
    for spec in supernet.problem.specs(CUT):
        for keep in ((), PRUNED.keep):
            candidate = Candidate(CUT, keep, spec.code_channels, spec.stride, spec.bits)
            found[candidate] = evaluator.measure(candidate, 0).accuracy
    assert min(found.values()) > 0.2
    assert sum(found.values()) / len(found) > 0.6
    for candidate in (WHOLE, replace(WHOLE, code_channels=2, stride=2, bits=1)):
        assert found[candidate] > alone.measure(candidate, 0).accuracy - 0.2


def test_a_pruned_whole_network_is_better_than_with_recalibrated_batch_norms_alone(supernet, evaluator, trained):
    untrained = Supernet(supernet.problem, copy.deepcopy(trained), supernet.splits)
    plain = Evaluator(supernet.problem, pictures(200, 0), pictures(100, 1), deployment(), 0, untrained)
    assert evaluator.measure(OUTPUT, 0).accuracy > plain.measure(OUTPUT, 0).accuracy


def test_a_trial_is_the_network_it_describes(supernet, evaluator):
    network = supernet.network(PRUNED)
    assert isinstance(network, CoInference)
    assert type(network.codec) is UniformCodec
    assert network.codec.code_shape == (8, 8, 8)
    problem = supernet.problem
    _, plan = prune_head(problem.head(CUT), EXAMPLE, dict(PRUNED.keep), layers_up_to(problem.cuts, CUT), cut_channels=True)
    assert problem.plan(CUT, dict(PRUNED.keep)) == plan
    assert network.head(EXAMPLE).shape[1] == network.codec.feature_shape[0] == len(problem.feature_channels(CUT, plan))
    measured = evaluator.measure(PRUNED, 0)
    assert measured.device_params == sum(parameter.numel() for parameter in network.device_half().parameters())
    assert 0 < measured.payload_bits <= 8 * 8 * 8 * 3 + 8


def test_the_channels_left_of_a_feature_are_those_that_are_not_silent(trained, module_params):
    problem = problem_of(trained, module_params)
    plan = narrowest(problem, CUT)
    assert problem.feature_channels(CUT, plan) == plan.kept["block1.conv2"]["out"]
    assert problem.feature_channels(CUT, problem.plan(CUT, {})) is None


def test_an_unpruned_device_half_is_the_backbones_own(supernet, trained):
    network, images = supernet.network(WHOLE), pictures(8, 3)[0]
    assert torch.equal(predict_logits(network.head, images), predict_logits(split(trained, EXAMPLE, CUT)[0], images))


def test_a_measurement_is_pure_and_draws_and_changes_nothing(supernet, evaluator):
    before = copy.deepcopy([network.state_dict() for network in (supernet.problem.backbone, supernet.body, *supernet.splits.values())])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = [evaluator.measure(candidate, 0) for candidate in (WHOLE, PRUNED, OUTPUT)]
    evaluator.measure(PRUNED, 1, rescores=True)
    assert [evaluator.measure(candidate, 7) for candidate in (WHOLE, PRUNED, OUTPUT)] == first, "nothing is drawn, so the seed is none"
    assert torch.equal(torch.get_rng_state(), state)
    after = [network.state_dict() for network in (supernet.problem.backbone, supernet.body, *supernet.splits.values())]
    assert all(torch.equal(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in old)


def test_what_needs_no_supernet_is_measured_without(evaluator):
    estimates = [evaluator.is_estimate(candidate) for candidate in (WHOLE, PRUNED, OUTPUT, Candidate("output"), Candidate("input", quality=50))]
    assert estimates == [True, True, True, False, False]
    assert evaluator.measure(Candidate("output"), 0).accuracy == evaluator.reference_accuracy


def test_training_on_from_the_supernet_is_measured_as_such(evaluator):
    estimated, trained_on = (evaluator.measure(replace(WHOLE, code_channels=2, stride=2, bits=1), 0, rescores=again) for again in (False, True))
    assert trained_on.accuracy > estimated.accuracy - 0.02
    assert trained_on != estimated
    assert trained_on.device_params == estimated.device_params


def test_trials_are_judged_by_a_fixed_part_of_validation(trained, module_params, supernet):
    validation = pictures(100, 1)
    judged = []
    for seed in (0, 0, 1):
        problem = problem_of(trained, module_params, validation_images=40)
        judged.append(Evaluator(problem, pictures(200, 0), validation, deployment(), seed).validation)
    assert len(judged[0][1]) == len(judged[0][0]) == 40
    assert torch.equal(judged[0][0], judged[1][0])
    assert not torch.equal(judged[0][0], judged[2][0])


def test_int8_is_judged_and_refused_where_accuracy_collapses(supernet, evaluator, monkeypatch):
    fp32, int8 = (evaluator.measure(replace(PRUNED, precision=precision), 0) for precision in ("fp32", "int8"))
    assert int8.accuracy == pytest.approx(fp32.accuracy, abs=0.05)
    monkeypatch.setattr("pipeline.search.evaluator.integer_half", lambda half, batches: nn.Sequential(half, nn.Threshold(2.0, 0.0)))
    with pytest.raises(ModelError, match=r"of block1 8ch /2 3bit keep 0\.50 int8 does not bear int8, which takes .* from 0\.\d+ to 0\.1\d*"):
        evaluator.measure(replace(PRUNED, precision="int8"), 0)


def test_what_is_written_is_read_again(supernet, tmp_path, evaluator, module_params, trained):
    problem = problem_of(trained, module_params)
    monkey = {CUT: problem.space().codes[CUT]}
    assert Supernet.load(problem, tmp_path) is None
    for name, network in (("output", supernet.body), *supernet.splits.items()):
        weights_file(tmp_path, name).write_bytes(weights_bytes(network))
    with pytest.raises(CoinferError, match=r"\.safetensors is missing or of another search space"):
        Supernet.load(problem, tmp_path)
    problem.space = lambda: replace(type(problem).space(problem), codes=monkey)
    loaded = Supernet.load(problem, tmp_path)
    again = Evaluator(problem, pictures(200, 0), pictures(100, 1), deployment(), 0, loaded)
    assert again.measure(PRUNED, 0) == evaluator.measure(PRUNED, 0)
    other = problem_of(trained, module_params, code_channels=[2, 3])
    with pytest.raises(CoinferError, match="of another search space"):
        Supernet.load(other, tmp_path)


def test_kinds_of_codec_are_trained_side_by_side(trained, module_params):
    """Each learns, though they share the steps, and one written next to another is read again."""
    kinds = ["rate", "codebook", "multi-rate"]
    problem = problem_of(trained, module_params, codecs=kinds, rate_weights=[0.0, 0.01], code_channels=[4], strides=[2], bits=[2, 3])
    supernet = train(problem, SETTINGS.model_copy(update={"epochs": 20}))
    evaluator = Evaluator(problem, pictures(200, 0), pictures(60, 1), deployment(), 0, supernet)
    small = Candidate(CUT, (), 4, 2, 3, codec="codebook")
    cheap, dear = (replace(small, codec="rate", rate_weight=rate) for rate in (0.0, 0.01))
    found = {code: evaluator.measure(code, 0) for code in (small, cheap, dear, replace(small, codec="multi-rate", bits=8, points=((4, 4), (2, 3), (1, 2))))}
    assert all(evaluator.is_estimate(code) for code in found)
    assert {code.codec for code, measured in found.items() if measured.accuracy > 0.5} == set(kinds)
    assert found[dear].payload_bits < found[cheap].payload_bits, "a dearer bit is spent less often"


def test_every_kind_of_codec_gets_its_share_of_the_lessons(trained, module_params):
    """Also one that has fewer sizes than the others."""
    problem = problem_of(trained, module_params, codecs=["rate", "multi-rate"], rate_weights=[0.0, 0.01, 0.1], bits=[1, 2, 3])
    network, drawn = SplitSupernet(problem, CUT), []
    for kind in network.codecs:
        code = network.codec(kind).code
        network.codec(kind).code = lambda spec, *given, code=code: drawn.append(spec) or code(spec, *given)
    lesson = SplitLesson(problem, CUT, network, None, SETTINGS)
    (images, labels), head = pictures(6, 0), problem.head(CUT)
    known, feature = outputs(problem.backbone, images), outputs(head, images)
    for seed in range(60):
        lesson.loss(normalise(images), labels, known, torch.tensor(seed), feature)
    assert len(problem.specs(CUT)) == 4 * 9 + 4
    for place, widths in enumerate(({8}, {2}, {2, 8})):
        of_place = drawn[place::3]
        assert {spec.code_channels for spec in of_place} == widths
        assert 20 <= sum(spec.kind == "multi-rate" for spec in of_place) <= 40


def test_a_kind_of_codec_that_was_not_trained_is_not_covered(evaluator):
    other = replace(WHOLE, codec="codebook")
    assert not evaluator.is_estimate(other)
    assert evaluator.measure(other, 0).accuracy > 0.3, "so it gets a training of its own"


def test_a_codec_outside_the_space_is_refused(evaluator):
    with pytest.raises(ModelError, match="the supernet was not trained for codec uniform of 5 channels"):
        evaluator.measure(replace(WHOLE, code_channels=5), 0)
