from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from models.codec import CodecSpec, RateCodec, SymbolCodec
from models.slimmable import SlimmableCodec
from pipeline.errors import ModelError

MAP = (8, 12, 12)
FEATURES = torch.randn(16, *MAP, generator=torch.Generator().manual_seed(0))


def specs(kind: str, widths: tuple[int, ...] = (2, 4, 8), strides: tuple[int, ...] = (1, 2, 4), bits: tuple[int, ...] = (1, 3)) -> list[CodecSpec]:
    rates = (0.0, 0.01) if kind == "rate" else (0.0,)
    points = {"points": ((2, 4), (1, 2))} if kind == "multi-rate" else {}
    return [CodecSpec(kind, *size, rate, **points) for *size, rate in itertools.product(widths, strides, bits, rates)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["uniform", "codebook", "rate", "multi-rate", "jscc-awgn"])
@pytest.mark.parametrize("channels", [None, (0, 3, 7)])
def test_an_ordinary_codec_taken_out_computes_what_the_shared_weights_do(kind: str, channels: tuple[int, ...] | None) -> None:
    slimmable = SlimmableCodec(specs(kind), MAP).train()
    x = FEATURES if channels is None else FEATURES[:, list(channels)]
    for spec in slimmable.specs:
        torch.manual_seed(1)
        within = slimmable.code(spec, x, channels)
        own = slimmable.at(spec, channels).train()
        torch.manual_seed(1)
        assert type(own).kind == kind
        assert own.code_shape[0] == spec.code_channels
        assert own(x).decoded.shape == (16, *MAP)
        if not isinstance(own, RateCodec):  # which has counted what it saw meanwhile
            torch.manual_seed(1)
            assert torch.equal(own(x).decoded, within.decoded)


def test_a_narrow_code_is_the_first_channels_of_the_widest() -> None:
    slimmable = SlimmableCodec(specs("uniform"), MAP)
    wide, narrow = (slimmable.at(CodecSpec("uniform", width, 2, 3)) for width in (8, 2))
    assert isinstance(wide, SymbolCodec)
    assert isinstance(narrow, SymbolCodec)
    assert torch.equal(wide.quantise(wide.encode(FEATURES))[:, :2], narrow.quantise(narrow.encode(FEATURES)))


def test_gradients_reach_what_a_codec_uses_and_nothing_else() -> None:
    slimmable = SlimmableCodec(specs("rate"), MAP).train()
    slimmable.code(CodecSpec("rate", 2, 2, 3, 0.01), FEATURES).decoded.square().mean().backward()
    touched = {name for name, weight in slimmable.weights.items() if weight.grad is not None and bool(weight.grad.any())}
    assert all(name.startswith("code/2/") for name in touched)
    assert {name.split("/")[2] for name in touched} == {"encode", "decode", "2 channels", "3 bits 0,01"}
    kernel = slimmable.weights["code/2/encode/0/weight"].grad
    assert kernel is not None
    assert bool(kernel[:2].any())
    assert not kernel[2:].any(), "channels beyond the code's"


def test_each_number_of_bits_counts_its_own_symbols() -> None:
    slimmable = SlimmableCodec(specs("rate", widths=(2, 4)), MAP).train()
    spec = CodecSpec("rate", 2, 2, 3, 0.01)
    before = {name: counts.clone() for name, counts in slimmable.named_buffers()}
    slimmable.code(spec, FEATURES)
    changed = [name for name, counts in slimmable.named_buffers() if not torch.equal(counts, before[name])]
    assert changed == ["code/2/3 bits 0,01/counts"]
    counts = slimmable.get_buffer(changed[0])
    assert bool((counts[:2] != before[changed[0]][:2]).any())
    assert torch.equal(counts[2:], before[changed[0]][2:])
    taken = slimmable.at(spec)
    assert isinstance(taken, RateCodec)
    assert torch.equal(taken.counts, counts[:2])


def test_vectors_are_coded_too() -> None:
    slimmable = SlimmableCodec(specs("uniform", strides=(1,)), (8,))
    assert slimmable.at(CodecSpec("uniform", 2, 1, 1), (1, 2, 5))(torch.randn(4, 3)).decoded.shape == (4, 8)


def test_all_members_learn_together() -> None:
    """Trained by turns, each restores about as much of the feature as when it is trained alone as often."""
    mixing = torch.randn(8, 2)
    data = torch.einsum("ck,nkhw->nchw", mixing, nn.functional.avg_pool2d(torch.randn(64, 2, 12, 12), 3, 1, 1))
    chosen = specs("uniform", widths=(2, 8), strides=(1, 2), bits=(4,))

    def error(codec: nn.Module, spec: CodecSpec, x: Tensor) -> Tensor:
        decoded = codec.code(spec, x).decoded if isinstance(codec, SlimmableCodec) else codec(x).decoded
        return nn.functional.mse_loss(decoded, x) / x.square().mean()

    def train(codec: SlimmableCodec, members: list[CodecSpec], steps: int) -> None:
        optimiser = torch.optim.Adam(codec.parameters(), 0.02)
        for _ in range(steps):
            loss = torch.stack([error(codec, spec, data[torch.randperm(64)[:32]]) for spec in members]).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()

    together = SlimmableCodec(chosen, MAP).train()
    train(together, chosen, 60)
    for spec in chosen:
        torch.manual_seed(0)
        alone = SlimmableCodec([spec], MAP).train()
        train(alone, [spec], 60)
        assert float(error(together, spec, data).detach()) < float(error(alone, spec, data).detach()) + 0.05 < 0.6


def test_what_it_was_not_made_for_is_refused() -> None:
    slimmable = SlimmableCodec(specs("uniform"), MAP)
    with pytest.raises(ModelError, match=r"not trained for codec uniform of 3 channels, stride 2 and 3 bits at this cut; choose among"):
        slimmable.at(CodecSpec("uniform", 3, 2, 3))
    with pytest.raises(ModelError, match="specs of several kinds"):
        SlimmableCodec([*specs("uniform"), *specs("codebook")], MAP)
    with pytest.raises(ModelError, match="of several kinds or none"):
        SlimmableCodec([], MAP)
