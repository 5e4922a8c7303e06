import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ParamsError
from pipeline.search.candidate import Candidate

splits = st.builds(
    Candidate,
    cut=st.sampled_from(["layer1.0", "layer2.2"]),
    keep=st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.25, 0.5, 1.0])).map(lambda keep: tuple(keep.items())),
    code_channels=st.integers(1, 64),
    stride=st.sampled_from([1, 2, 4, 8]),
    bits=st.integers(1, 8),
    codec=st.sampled_from([None, "uniform", "codebook"]),
)
rates = st.builds(Candidate, st.just("layer1.0"), st.just(()), st.just(4), st.just(1), st.just(2), codec=st.just("rate"), rate_weight=st.floats(0, 1))
others = st.one_of(st.builds(Candidate, cut=st.just("input"), quality=st.integers(1, 100)), st.just(Candidate("output", (("a", 0.5),))))


several = st.just(Candidate("layer1.0", (), 4, 1, 8, codec="multi-rate", points=((4, 4), (2, 2))))


@given(st.one_of(splits, rates, several, others))
def test_a_candidate_survives_json(candidate):
    assert Candidate.from_dict(candidate.to_dict()) == candidate
    assert hash(Candidate.from_dict(candidate.to_dict())) == hash(candidate)


def test_keeping_a_block_whole_is_not_naming_it():
    assert Candidate("output", (("b", 0.5), ("a", 1.0))) == Candidate("output", (("b", 0.5),))
    assert Candidate("output", (("b", 0.5), ("a", 0.5))) == Candidate("output", (("a", 0.5), ("b", 0.5)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 0}, "bits is 0; choose 1 to 8"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 9}, "bits is 9; choose 1 to 8"),
        ({"cut": "layer1", "code_channels": 2, "stride": 3, "bits": 2}, "stride is 3"),
        ({"cut": "layer1", "code_channels": 0, "stride": 1, "bits": 2}, "code_channels is 0"),
        ({"cut": "layer1", "code_channels": 2}, "needs code_channels, stride and bits"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 2, "keep": {"a": -0.5}}, "keep ratio of a is -0.5"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 2, "keep": [["a", 0.5, 1]]}, "candidate"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 2, "codec": "morse"}, "codec is morse; choose one of uniform, codebook, rate"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 2, "codec": "rate"}, "codec rate with rate_weight None; rate takes 0 or more, others none"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 2, "rate_weight": 0.1}, "codec uniform with rate_weight 0.1"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 8, "codec": "multi-rate"}, "multi-rate with 0 points; multi-rate has some, others none"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 8, "points": [[2, 4]]}, "codec uniform with 1 points"),
        ({"cut": "output", "codec": "uniform"}, "only a split has"),
        ({"cut": "output", "precision": "int8"}, "only a split has"),
        ({"cut": "layer1", "code_channels": 2, "stride": 1, "bits": 2, "precision": "int4"}, "precision is int4; choose one of fp32, int8"),
        ({"cut": "input"}, "quality is None"),
        ({"cut": "input", "quality": 0}, "quality is 0"),
        ({"cut": "input", "quality": 100, "image_format": "jpeg"}, "quality is 100; choose 1 to 99, or 100 for lossless WebP or PNG"),
        ({"cut": "input", "quality": 50, "image_format": "png"}, "quality is 50"),
        ({"cut": "input", "quality": 50, "image_format": "avif"}, "image_format is avif; choose one of webp, jpeg, jpeg-bare, png"),
        ({"cut": "output", "image_format": "webp"}, "nothing is sent"),
        ({"cut": "input", "quality": 50, "keep": {"a": 0.5}}, "no device half"),
        ({"cut": "input", "quality": 50, "bits": 2}, "only a split has"),
        ({"cut": "output", "quality": 50}, "nothing is sent"),
        ({"cut": "output", "colour": "red"}, "colour"),
    ],
)
def test_a_candidate_that_cannot_run_is_refused(fields, message):
    with pytest.raises(ParamsError, match=message):
        Candidate.from_dict(fields)


def test_an_image_without_a_format_is_webp():
    assert Candidate("input", quality=50) == Candidate("input", quality=50, image_format="webp")
    assert Candidate("input", quality=50) != Candidate("input", quality=50, image_format="jpeg")


def test_labels_are_short():
    assert Candidate("output").label() == "device-only"
    assert Candidate("input", quality=100).label() == "WebP lossless"
    assert Candidate("input", quality=40, image_format="jpeg-bare").label() == "JPEG-bare q40"
    assert Candidate("layer2.0", (("a", 0.5),), 4, 2, 3).label() == "layer2.0 4ch /2 3bit keep 0.50"
    assert Candidate("layer2.0", (), 4, 2, 3, codec="rate", rate_weight=1e-3).label() == "layer2.0 4ch /2 3bit rate 0.001"
    assert Candidate("layer2.0", (), 4, 2, 3, codec="codebook").label() == "layer2.0 4ch /2 3bit codebook"
    assert Candidate("layer2.0", (), 4, 2, 3, precision="int8").label() == "layer2.0 4ch /2 3bit int8"
