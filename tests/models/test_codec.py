from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models.codec import CodebookCodec, CodecSpec, FeatureCodec, MultiRateCodec, RateCodec, SymbolCodec, context_count, context_rows
from models.codecs import CODECS as ALL
from models.codecs import build_codec
from models.jscc import ChannelCodec
from pipeline.errors import ModelError
from pipeline.runtime import coder

SYMBOLS = ["uniform", "codebook", "rate"]
NOISY = ["jscc-awgn", "jscc-bec", "jscc-bsc"]
CODECS = [*SYMBOLS, *NOISY]
BASELINES = [kind for kind in ALL if kind not in CODECS]


def symbol_codec(kind: str, shape: tuple[int, ...], code_channels: int, stride: int, bits: int, rate_weight: float = 0.0) -> SymbolCodec:
    codec = build_codec(CodecSpec(kind, code_channels, stride, bits, rate_weight), shape)
    assert isinstance(codec, SymbolCodec)
    return codec


def feature_of_three_causes(count: int = 32) -> Tensor:
    return torch.relu(torch.einsum("bkhw,kc->bchw", torch.randn(count, 3, 8, 8), torch.randn(3, 8)))


def train(codec: FeatureCodec, feature: Tensor, steps: int = 120, rate: float = 0.02) -> float:
    """The share of the feature's variance that the trained codec does not restore."""
    optimizer = torch.optim.Adam(codec.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        coded = codec(feature)
        (nn.functional.mse_loss(coded.decoded, feature) + coded.loss).backward()
        optimizer.step()
    codec.eval()
    with torch.no_grad():
        return float(nn.functional.mse_loss(codec(feature).decoded, feature) / feature.var())


@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_exactly_two_to_the_bits_levels_and_the_top_one_does_not_wrap(kind: str, bits: int) -> None:
    codec = symbol_codec(kind, (4, 4, 4), 2, 1, bits)
    symbols = codec.quantise(torch.linspace(0, 1, 100_001))
    assert symbols.dtype == torch.uint8
    assert symbols.unique().tolist() == list(range(2**bits))
    assert symbols[0] == 0
    assert symbols[-1] == codec.quantise(torch.tensor([0.999]))[0] == 2**bits - 1
    assert (symbols.int().diff() >= 0).all()
    levels = codec.dequantise(torch.arange(2**bits, dtype=torch.uint8))
    assert levels[0] == 0
    assert levels[-1] == 1
    assert torch.equal(codec.quantise(levels), torch.arange(2**bits, dtype=torch.uint8))


def test_ties_round_to_even_as_in_onnx() -> None:
    assert symbol_codec("uniform", (4, 4, 4), 2, 1, 2).quantise(torch.tensor([0.5, 1.5, 2.5]) / 3).tolist() == [0, 2, 2]


@pytest.mark.parametrize("kind", CODECS)
def test_the_code_stays_within_bounds_whatever_the_feature(kind: str) -> None:
    u = build_codec(CodecSpec(kind, 2, 1, 8), (4, 6, 6)).encode(torch.randn(8, 4, 6, 6) * 1e4)
    assert u.min() == 0
    assert u.max() == 1


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(16, 16), (15, 17), (11, 9), (28, 23)])
def test_code_has_the_size_promised_and_the_feature_comes_back_whole(kind: str, stride: int, size: tuple[int, int]) -> None:
    codec = build_codec(CodecSpec(kind, 3, stride, 4), (6, *size))
    feature = torch.randn(2, 6, *size)
    assert codec.encode(feature).shape[1:] == codec.code_shape == (3, -(-size[0] // stride), -(-size[1] // stride))
    assert codec(feature).decoded.shape == feature.shape


@pytest.mark.parametrize("kind", CODECS)
def test_a_vector_is_coded_by_linear_layers(kind: str) -> None:
    codec = build_codec(CodecSpec(kind, 4, 1, 3), (10,))
    vector = torch.randn(8, 10)
    assert codec.encode(vector).shape == (8, *codec.code_shape) == (8, 4, 1, 1)
    assert codec(vector).decoded.shape == (8, 10)
    assert not [layer for layer in codec.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]


@pytest.mark.parametrize("shape", [(6, 8, 8), (6,)])
def test_a_pruned_feature_comes_back_with_the_channels_the_edge_half_wants(shape: tuple[int, ...]) -> None:
    codec = build_codec(CodecSpec("uniform", 4, 1, 3), shape, restored_channels=16)
    assert codec(torch.randn(2, *shape)).decoded.shape == (2, 16, *shape[1:])


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 7), (4, 16), (8, 17)])
def test_every_place_of_the_restored_feature_depends_on_the_code(stride: int, size: int) -> None:
    """A transposed 3x3 with stride 4 would leave holes that hold the bias alone."""
    codec = symbol_codec("uniform", (2, size, size), 2, stride, 8).eval()
    assert isinstance(codec.decode, nn.Sequential)
    nn.init.ones_(codec.decode[0].weight)
    code = torch.rand(1, *codec.code_shape)
    assert (codec.decode(code + 1) - codec.decode(code)).abs().min() > 1e-3


@pytest.mark.parametrize(("stride", "expected"), [(1, [(1, 1)]), (2, [(3, 2)]), (3, [(3, 3)]), (4, [(3, 2), (3, 2)]), (8, [(3, 2), (3, 4)])])
def test_the_encoder_is_at_most_two_small_convolutions(stride: int, expected: list[tuple[int, int]]) -> None:
    encoder = symbol_codec("uniform", (8, 16, 16), 4, stride, 4).encode
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.kernel_size, conv.stride) for conv in convolutions] == [((kernel, kernel), (step, step)) for kernel, step in expected]


@pytest.mark.parametrize("kind", SYMBOLS)
def test_training_sees_the_numbers_the_edge_will_see_and_gradients_pass_straight_through(kind: str) -> None:
    torch.manual_seed(0)
    codec = symbol_codec(kind, (6, 7, 7), 3, 2, 3).eval()
    feature = torch.randn(4, 6, 7, 7)
    assert torch.equal(codec(feature).decoded, codec.decode(codec.dequantise(codec.quantise(codec.encode(feature)))))
    assert isinstance(codec.encode, nn.Sequential)
    smooth = torch.autograd.grad(codec.decode(codec.encode(feature)).sum(), codec.encode[0].weight)[0]
    quantised = torch.autograd.grad(codec(feature).decoded.sum(), codec.encode[0].weight)[0]
    assert quantised.abs().max() > 0
    torch.testing.assert_close(quantised, smooth)


@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_codec_learns_and_uses_its_levels(kind: str, bits: int) -> None:
    torch.manual_seed(0)
    feature = feature_of_three_causes()
    codec = symbol_codec(kind, (8, 8, 8), 6, 1, bits)
    assert train(codec, feature) < (0.45 if bits == 1 else 0.2)
    assert len(codec.quantise(codec.encode(feature)).unique()) >= 0.75 * 2**bits


@pytest.mark.parametrize("kind", CODECS)
def test_evaluation_moves_no_statistics(kind: str) -> None:
    codec = build_codec(CodecSpec(kind, 3, 1, 3), (6, 5, 5)).eval()
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    codec(torch.randn(4, 6, 5, 5) + 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())


def test_a_rate_in_the_loss_buys_fewer_bits_for_more_distortion() -> None:
    torch.manual_seed(0)
    feature = feature_of_three_causes()
    points = []
    for rate_weight in (0.0, 2e-4, 2e-3):
        torch.manual_seed(1)
        codec = symbol_codec("rate", (8, 8, 8), 6, 1, 4, rate_weight)
        distortion = train(codec, feature)
        assert isinstance(codec, RateCodec)
        points.append((float(codec.bits_of(codec.quantise(codec.encode(feature))).sum()) / len(feature), distortion))
    assert points[0][0] > 1.15 * points[1][0] > 1.3 * points[2][0]
    assert points[0][1] <= points[1][1] + 0.01 <= points[2][1] + 0.02


def test_counted_bits_are_the_entropy_given_the_neighbours() -> None:
    codec = symbol_codec("rate", (3, 16, 16), 3, 1, 2, 1e-3)
    assert isinstance(codec, RateCodec)
    torch.manual_seed(0)
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]])
    independent = [torch.multinomial(row, 64 * 256, replacement=True).reshape(64, 16, 16) for row in shares]
    repeated = torch.randint(4, (64, 1, 1)).expand(64, 16, 16)  # its neighbours tell all, but for the first
    symbols = torch.stack([*independent, repeated], 1).to(torch.uint8)
    u = codec.dequantise(symbols)
    for _ in range(300):
        codec.loss(u, symbols, u)
    bits = codec.bits_of(symbols)
    assert float(bits[:, 0].mean()) == pytest.approx(1.75, abs=0.03)
    assert float(bits[:, 1].mean()) < 0.02
    assert float(bits[:, 2].sum((1, 2)).mean()) == pytest.approx(2, abs=0.6)
    assert float(codec.loss(u, symbols, u)) == pytest.approx(1e-3 * float(bits.sum()) / 64, rel=1e-3)


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_training_counts_by_the_sum_of_two_neighbours(bits: int) -> None:
    symbols = torch.randint(2**bits, (3, 2, 5, 4), dtype=torch.uint8)
    contexts = context_count(bits)
    found = context_rows(symbols, 2**bits, contexts)
    values, step = symbols.long(), (contexts - 1) / (2 ** (bits + 1) - 1)
    assert (found[:, 0, 1:, 1:] == ((values[:, 0, 1:, :-1] + values[:, 0, :-1, 1:]) * step).floor()).all()
    assert (found[:, 1, 0, 1:] == contexts + (2 * values[:, 1, 0, :-1] * step).floor()).all()
    assert (found[:, 0, 1:, 0] == (2 * values[:, 0, :-1, 0] * step).floor()).all()
    assert (found[:, :, 0, 0] == torch.tensor([contexts - 1, 2 * contexts - 1])).all()


def test_the_gradient_of_the_rate_leads_to_the_cheaper_neighbour() -> None:
    codec = symbol_codec("rate", (1, 2, 2), 1, 1, 2, 1.0).eval()
    assert isinstance(codec, RateCodec)
    codec.counts.copy_(1000 * torch.tensor([0.1, 0.6, 0.2, 0.1]).expand(1, 8, 4))
    u = torch.tensor([0.2, 0.5, 0.9, 1.0]).reshape(1, 1, 2, 2).requires_grad_(True)
    symbols = codec.quantise(u)
    codec.loss(u, symbols, codec.dequantise(symbols)).backward()
    assert u.grad is not None
    towards = -u.grad.flatten()
    expected = [3 * math.log2(0.6 / 0.1), -3 * math.log2(0.6 / 0.2), -3 * math.log2(0.2 / 0.1), -3 * math.log2(0.2 / 0.1)]
    assert towards.tolist() == pytest.approx(expected, rel=1e-4), "bits from one level to the next, per unit of u; the end of the range leads back into it"


POINTS = ((6, 8), (6, 4), (3, 2), (1, 1))


def test_one_codec_learns_several_rates_and_loses_more_at_fewer_bits() -> None:
    torch.manual_seed(0)
    feature = feature_of_three_causes()
    codec = build_codec(CodecSpec("multi-rate", 6, 1, 8, points=POINTS), (8, 8, 8))
    assert isinstance(codec, MultiRateCodec)
    first = train(codec, feature, steps=400)
    lost = []
    with torch.no_grad():
        for codec.point in range(len(POINTS)):
            lost.append(float(nn.functional.mse_loss(codec(feature).decoded, feature) / feature.var()))
    assert lost[0] == pytest.approx(first)
    assert lost == sorted(lost)
    assert lost[1] < 0.25
    assert lost[2] < 0.6 < 1


def test_every_batch_is_coded_at_a_point_of_its_own_and_evaluation_starts_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codec = build_codec(CodecSpec("multi-rate", 6, 1, 8, points=POINTS), (8, 8, 8))
    assert isinstance(codec, MultiRateCodec)
    seen: list[int] = []
    sent = codec._sent
    monkeypatch.setattr(codec, "_sent", lambda symbols, point: seen.append(point) or sent(symbols, point))
    for _ in range(40):
        codec(torch.randn(2, 8, 8, 8))
    assert set(seen) == {0, 1, 2, 3}
    codec.eval()(torch.randn(2, 8, 8, 8))
    codec.point = 2
    codec.eval()(torch.randn(2, 8, 8, 8))
    assert seen[40:] == [0, 2]


@pytest.mark.parametrize("point", range(len(POINTS)))
def test_what_training_lets_through_is_what_the_coder_does(point: int) -> None:
    codec = build_codec(CodecSpec("multi-rate", 6, 1, 8, points=POINTS), (8, 5, 5)).eval()
    assert isinstance(codec, MultiRateCodec)
    codec.point = point
    symbols = torch.randint(256, (20, 6, 5, 5), dtype=torch.uint8)
    tables = coder.build_embedded_tables(symbols.numpy(), *POINTS[point])
    assert (codec.received(symbols).numpy() == coder.as_received(symbols.numpy(), tables)).all()
    feature = torch.randn(4, 8, 5, 5)
    arrived = codec.received(codec.quantise(codec.encode(feature)))
    assert torch.equal(codec(feature).decoded, codec.decode(codec.dequantise(arrived)))


def test_gradients_flow_only_through_what_is_sent() -> None:
    codec = build_codec(CodecSpec("multi-rate", 6, 1, 8, points=((2, 3),)), (8, 5, 5))
    assert isinstance(codec, MultiRateCodec)
    assert isinstance(codec.encode, nn.Sequential)
    codec(torch.randn(4, 8, 5, 5)).decoded.square().sum().backward()
    reached = codec.encode[0].weight.grad.flatten(1).abs().sum(1) > 0
    assert reached.tolist() == [True, True, False, False, False, False]


def test_a_codebook_moves_its_values_to_where_the_code_is() -> None:
    torch.manual_seed(0)
    codec = symbol_codec("codebook", (1, 4, 4), 1, 1, 2)
    assert isinstance(codec, CodebookCodec)
    clusters = torch.tensor([0.1, 0.2, 0.75, 0.8])
    u = clusters[torch.randint(4, (32, 1, 4, 4))] + 0.005 * torch.randn(32, 1, 4, 4)
    optimizer = torch.optim.SGD([codec.values], 0.5)
    for _ in range(400):
        optimizer.zero_grad()
        symbols = codec.quantise(u)
        codec.loss(u, symbols, codec.dequantise(symbols)).backward()
        optimizer.step()
    symbols = codec.quantise(u)
    assert (codec.dequantise(symbols) - u).abs().max() < 0.06
    assert codec.dequantise(torch.arange(4, dtype=torch.uint8)).diff().min() >= 0, "symbols stay in the order of their values, whatever order training left"


def test_codebook_and_code_draw_each_other_by_their_own_weights() -> None:
    codec = build_codec(CodecSpec("codebook", 1, 1, 1, commitment=0.25), (1, 2, 2))
    assert isinstance(codec, CodebookCodec)
    u = torch.full((1, 1, 2, 2), 0.8, requires_grad=True)
    codec.loss(u, codec.quantise(u), codec.dequantise(codec.quantise(u))).backward()
    assert u.grad is not None
    assert codec.values.grad is not None
    assert u.grad.sum().item() == pytest.approx(0.25 * 2 * (0.8 - 1.0))
    assert codec.values.grad.tolist() == pytest.approx([0, 2 * (1.0 - 0.8)])


@pytest.mark.parametrize("kind", NOISY)
def test_a_channel_codec_learns_to_live_with_noise_and_suffers_more_from_more(kind: str) -> None:
    torch.manual_seed(0)
    feature = feature_of_three_causes()
    low, high = (0.02, 0.3) if kind == "jscc-awgn" else (0.002, 0.1)
    codec = build_codec(CodecSpec(kind, 6, 1, 8, noise=(low, high)), (8, 8, 8))
    assert isinstance(codec, ChannelCodec)
    train(codec, feature)

    def distortion(noise: float) -> float:
        codec.at(noise)
        with torch.no_grad():
            return float(nn.functional.mse_loss(codec(feature).decoded, feature) / feature.var())

    little, some, much = distortion(low), distortion(math.sqrt(low * high)), distortion(high)
    assert little < some < much
    assert little < 0.15


@pytest.mark.parametrize("kind", NOISY)
def test_the_encoder_knows_the_noise_and_it_changes_from_batch_to_batch_in_training(kind: str) -> None:
    torch.manual_seed(0)
    codec = build_codec(CodecSpec(kind, 3, 1, 8), (6, 8, 8))
    assert isinstance(codec, ChannelCodec)
    seen: list[Tensor] = []
    assert isinstance(codec.encode, nn.Sequential)
    codec.encode[1][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, -1]))
    for _ in range(4):
        codec(torch.randn(5, 6, 8, 8))
    codec.eval()
    for noise in (0.1, 0.2):
        codec.at(noise)
        codec(torch.randn(5, 6, 8, 8))
    planes = [plane.unique() for plane in seen]
    assert all(len(plane) == 1 for plane in planes), "one level for the whole batch"
    assert len({float(plane) for plane in planes[:4]}) == 4
    assert [float(plane) for plane in planes[4:]] == pytest.approx([0.1, 0.2])


def test_channel_uses_are_reals_for_awgn_and_bits_for_the_digital_channels() -> None:
    uses = {kind: build_codec(CodecSpec(kind, 3, 2, 8), (6, 8, 8)) for kind in NOISY}
    assert {kind: codec.channel_uses for kind, codec in uses.items() if isinstance(codec, ChannelCodec)} == {
        "jscc-awgn": 48,
        "jscc-bec": 8 * 48,
        "jscc-bsc": 8 * 48,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits is 0; choose 1 to 8"),
        ({"bits": 9}, "bits is 9; choose 1 to 8"),
        ({"code_channels": 9}, "code_channels is 9 for a feature of 8 channels; choose 1 to 8"),
        ({"code_channels": 0}, "code_channels is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"kind": "vector"}, "kind is vector; choose one of uniform, codebook, rate, multi-rate, jscc-awgn, jscc-bec, jscc-bsc, raw-fp32"),
        ({"kind": "multi-rate"}, r"points are \[\]; give pairs of channels, 1 to 4"),
        ({"kind": "multi-rate", "points": ((5, 2),)}, r"points are \[\(5, 2\)\]; give pairs of channels, 1 to 4, and bits, 1 to 8"),
        ({"kind": "rate", "rate_weight": -1.0}, "rate_weight is -1.0; choose 0 or more"),
        ({"kind": "rate", "rate_weight": math.nan}, "rate_weight is nan; choose 0 or more"),
        ({"kind": "jscc-awgn", "noise": (0.0, 0.1)}, r"jscc-awgn: noise is 0.0 to 0.1; give two standard deviations above 0"),
        ({"kind": "jscc-bsc", "noise": (0.1, 0.7)}, r"probabilities above 0 and at most .5"),
    ],
)
def test_impossible_codecs_are_refused(fields: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"kind": "uniform", "code_channels": 4, "stride": 1, "bits": 4}
    with pytest.raises(ModelError, match=message):
        build_codec(CodecSpec(**(good | fields)), (8, 8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "stride", "message"),
    [
        ((8,), 2, "stride is 2, but the feature at this cut is a vector of 8; choose stride 1"),
        ((197, 768), 1, "neither a map .* nor a vector"),
        ((8, 4, 4), 8, "stride 8 is larger than the 4x4 feature"),
        ((8, 4, 4), 4, "leaves 1x1 of the 4x4 feature, below 2x2"),
        ((8, 1, 1), 1, "below 2x2"),
    ],
)
def test_features_that_cannot_be_coded_are_refused(shape: tuple[int, ...], stride: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_codec(CodecSpec("uniform", 4, stride, 4), shape)


@pytest.mark.parametrize("kind", CODECS)
def test_a_feature_of_another_size_is_refused_not_bent(kind: str) -> None:
    with pytest.raises(ModelError, match=r"made for a feature of \(4, 8, 8\), got one of \(4, 7, 7\)"):
        build_codec(CodecSpec(kind, 2, 2, 4), (4, 8, 8))(torch.randn(2, 4, 7, 7))
