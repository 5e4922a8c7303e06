from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.split_points import Point, _least_needed, _take_over
from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from models.cutting import count_macs, cut_points
from models.pruning import Pruner
from pipeline.errors import ModelError
from pipeline.networks import layers_up_to

EXAMPLE = torch.zeros(1, 3, 16, 16)


def test_a_narrower_code_takes_over_the_channels_the_decoder_leans_on(tiny_backbone: nn.Module) -> None:
    torch.manual_seed(0)
    wide, narrow = (build_split(tiny_backbone.eval(), EXAMPLE, "block2", CodecSpec("uniform", width, 4, 3)) for width in (6, 2))
    first = next(layer for layer in wide.codec.decode.modules() if isinstance(layer, nn.ConvTranspose2d))
    with torch.no_grad():
        first.weight[[1, 4]] *= 10
        first.weight[[0, 2, 3, 5]] *= 0.1
    _take_over(narrow, wide)
    feature = wide.head(torch.randn(4, 3, 16, 16))
    code = wide.codec.encode(feature)
    torch.testing.assert_close(narrow.codec.encode(feature), code[:, [1, 4]])
    alone = torch.zeros_like(code)
    alone[:, [1, 4]] = code[:, [1, 4]]
    torch.testing.assert_close(narrow.codec.decode(code[:, [1, 4]]), wide.codec.decode(alone))


def test_the_blocks_that_are_missed_least_go_first(tiny_backbone: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_split(tiny_backbone.eval(), EXAMPLE, "block2", CodecSpec("uniform", 16, 1, 8))
    layers = layers_up_to(cut_points(tiny_backbone, EXAMPLE), "block2")
    macs = count_macs(network.head, EXAMPLE)
    share = sum(macs.get(layer, 0) for layer in layers["block1"]) / sum(macs.values())

    def accuracy(network: CoInference, split: object) -> float:
        silent = [block for block in ("block1", "block2") if not network.head.get_submodule(f"{block}.bn2").weight.any()]
        assert len(silent) == 1, "one at a time"
        return {"block1": 0.9, "block2": 0.5}[silent[0]]

    monkeypatch.setattr("benchmarks.split_points.load_split", lambda name: (torch.zeros(4, 3, 16, 16), torch.zeros(4)))
    monkeypatch.setattr("benchmarks.split_points.accuracy", accuracy)
    before = [tensor.clone() for tensor in network.state_dict().values()]
    chooser = Pruner(network.head, EXAMPLE, layers)
    assert _least_needed(network, chooser, layers, share) == ["block1"]
    assert _least_needed(network, chooser, layers, share + 0.01) == ["block1", "block2"]
    assert all(torch.equal(was, now) for was, now in zip(before, network.state_dict().values(), strict=True)), "nothing stays silent"
    with pytest.raises(ModelError, match="compute less than 99% of the head's MACs; choose less"):
        _least_needed(network, chooser, layers, 0.99)


def test_a_point_behind_a_frozen_head_knows_whose_head_that_is() -> None:
    given = Point("resnet20", "weights", "layer2.2", CodecSpec("uniform", 8, 2, 4), 3, 0)
    still_given = dataclasses.replace(given, before=given)
    adapted = dataclasses.replace(given, epochs=2, before=still_given)
    behind = dataclasses.replace(given, before=dataclasses.replace(given, before=adapted))
    assert [point.head_from for point in (given, still_given, adapted, behind)] == [None, None, None, adapted]
    assert [", head frozen" in point.name for point in (given, still_given, adapted, behind)] == [True, True, False, False]
