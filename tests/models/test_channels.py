from __future__ import annotations

import math

import pytest
import torch

from models.channels import awgn, binary_erasure, binary_symmetric, check_noise, draw_noise
from pipeline.errors import ModelError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_awgn_adds_white_noise_of_the_given_deviation() -> None:
    u = torch.rand(200, 4, 8, 8)
    noise = awgn(u, 0.1) - u
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(noise.mean().item()) < 1e-3
    assert abs((noise[:, :, 1:] * noise[:, :, :-1]).mean().item()) < 1e-4, "neighbours are independent"


@pytest.mark.parametrize("probability", [0.05, 0.25, 0.5])
def test_a_flipped_or_erased_bit_moves_u_by_what_it_is_worth(probability: float) -> None:
    """E[(sum of w_i e_i / 255)^2] over independent bits, by enumeration of what each can do."""
    u = torch.randint(0, 256, (400, 4, 8, 8)) / 255
    weights = 2.0 ** torch.arange(8) / 255
    flipped = binary_symmetric(u, probability) - u
    erased = binary_erasure(u, probability) - u
    # A flip moves a bit of a random symbol by +-1, an erasure by +-1/2; the signs of different bits are independent.
    assert flipped.square().mean().item() == pytest.approx((probability * weights.square()).sum().item(), rel=0.05)
    assert erased.square().mean().item() == pytest.approx((probability * weights.square() / 4).sum().item(), rel=0.05)


def test_a_perfect_digital_channel_only_rounds_to_256_levels() -> None:
    u = torch.rand(10, 4, 8, 8)
    for channel in (binary_erasure, binary_symmetric):
        torch.testing.assert_close(channel(u, 0.0), torch.round(u * 255) / 255)


def test_all_bits_lost_leave_the_middle_and_all_flipped_the_complement() -> None:
    u = torch.tensor([0.0, 1.0, 77 / 255])
    torch.testing.assert_close(binary_erasure(u, 1.0), torch.full((3,), 0.5))
    torch.testing.assert_close(binary_symmetric(u, 1.0), 1 - u)


@pytest.mark.parametrize("channel", [awgn, binary_erasure, binary_symmetric])
def test_gradients_pass_straight_through(channel: object) -> None:
    u = torch.rand(2, 3, 4, 4, requires_grad=True)
    weights = torch.randn(2, 3, 4, 4)
    assert callable(channel)
    (channel(u, 0.2) * weights).sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(u.grad, weights)


@pytest.mark.parametrize("kind", ["jscc-awgn", "jscc-bec", "jscc-bsc"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (math.nan, 0.1), (0.1, math.nan), (0.2, 0.1), (-0.1, 0.1), (0.1, math.inf)])
def test_noise_of_nothing_nan_or_no_end_is_refused(kind: str, low: float, high: float) -> None:
    with pytest.raises(ModelError, match=rf"codec {kind}: noise is .* the smaller first"):
        check_noise(kind, low, high)


def test_a_probability_stays_below_one_half_and_a_deviation_need_not() -> None:
    check_noise("jscc-awgn", 0.1, 2.0)
    check_noise("jscc-bsc", 0.1, 0.5)
    with pytest.raises(ModelError, match=r"probabilities above 0 and at most \.5"):
        check_noise("jscc-bsc", 0.1, 0.6)


def test_noise_is_drawn_evenly_in_decibels() -> None:
    decibels = torch.tensor([-20 * math.log10(draw_noise(0.05623, 1.0)) for _ in range(4000)])
    assert 0 <= decibels.min() < 0.2
    assert 24.8 < decibels.max() <= 25.01
    assert decibels.mean().item() == pytest.approx(12.5, abs=0.4)
    assert draw_noise(0.3, 0.3) == pytest.approx(0.3)
