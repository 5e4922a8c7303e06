from __future__ import annotations

import pytest
import torch

from models.backbones import build_backbone
from models.operations import operations
from pipeline.costs.chains import Chain, random_chains
from pipeline.costs.fused import KernelCall, kernel_calls
from pipeline.costs.profiled import profiled_kernels
from tests.pipeline.costs.kernels import profiled_session, this_block


@pytest.fixture(scope="module")
def chains() -> list[Chain]:
    return random_chains(99, seed=0)


@pytest.fixture(scope="module")
def calls(chains: list[Chain]) -> set[KernelCall]:
    return {time.call for chain in chains for time in profiled_kernels(*profiled_session(chain.model))}


def test_one_seed_gives_the_same_chains_and_another_one_others(chains: list[Chain]) -> None:
    assert random_chains(6, seed=0) == chains[:6]
    assert random_chains(6, seed=1) != chains[:6]


def test_chains_are_small_and_of_both_precisions(chains: list[Chain]) -> None:
    assert {chain.precision for chain in chains} == {"fp32", "int8"}
    assert max(len(chain.model) for chain in chains) < 8_000_000


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v3_small", "densenet121", "efficientnet_b0"])
def test_they_call_the_kernels_that_halves_of_classifiers_call(name: str, calls: set[KernelCall]) -> None:
    half = operations(build_backbone(name, 10, 64), torch.zeros(1, 3, 64, 64))
    for precision in ("fp32", "int8"):
        asked = {call.op for call in kernel_calls(half, precision, block=this_block())}  # type: ignore[arg-type]
        assert asked <= {call.op for call in calls}
