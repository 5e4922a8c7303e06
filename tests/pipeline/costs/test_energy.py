"""Energy: computing, sending and waiting each at its own power."""

import math

import pytest

from pipeline.costs.energy import BOARDS, PowerModel, board, energy_mj
from pipeline.errors import ProfileError

PI = board("raspberry-pi-4")
PARTS = {"device_ms": 10.0, "encode_ms": 2.0, "link_ms": 30.0, "decode_ms": 1.0, "edge_ms": 4.0, "total_ms": 47.0}


def test_each_part_is_charged_at_its_own_power() -> None:
    assert energy_mj(PARTS, PowerModel(cpu_w=5, tx_w=3, idle_w=2), tx_ms=16) == pytest.approx(5 * 12 + 3 * 16 + 2 * (14 + 1 + 4))


def test_device_only_is_charged_for_computing_alone() -> None:
    parts = {"device_ms": 10.0, "encode_ms": 0.0, "link_ms": 0.0, "decode_ms": 0.0, "edge_ms": 0.0, "total_ms": 10.0}
    assert energy_mj(parts, PI, tx_ms=0) == pytest.approx(PI.cpu_w * 10)


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_draws_least_when_it_waits(name: str) -> None:
    power = board(name)
    assert 0 < power.idle_w < min(power.tx_w, power.cpu_w)


def test_an_unknown_board_is_named() -> None:
    with pytest.raises(ProfileError, match="board abacus is unknown; choose one of raspberry-pi-4, jetson-nano"):
        board("abacus")


def test_sending_longer_than_the_link_was_used_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"transmit_ms"):
        energy_mj(PARTS, PI, tx_ms=31)


@pytest.mark.parametrize("watts", [-1, math.nan, math.inf])
def test_a_power_that_cannot_be_is_refused(watts: float) -> None:
    with pytest.raises(ProfileError, match="tx_w"):
        PowerModel(cpu_w=1, tx_w=watts, idle_w=1)
