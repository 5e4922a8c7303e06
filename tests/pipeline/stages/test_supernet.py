import csv
import json

import pytest
import torch
from safetensors.torch import save_file

from models.cutting import cut_points
from pipeline.errors import Interrupted
from pipeline.params import parse_params
from pipeline.paths import BACKBONE_WEIGHTS, CHECKPOINTS, DATA_CARD, DevicePaths, split_file
from pipeline.search.build import build_evaluator
from pipeline.search.supernet import Supernet
from pipeline.search.supernet_training import SplitLesson
from pipeline.stages import search, supernet
from tests.pipeline.costs.profiles import toy_profile
from tests.pipeline.search.toy import DEVICE_MS_PER_MMAC, EDGE_MS_PER_MMAC, pictures

PATHS = DevicePaths("camera")


@pytest.fixture
def prepared(workdir, tiny_backbone):
    """What the stages before would have left."""
    for path in (DATA_CARD, BACKBONE_WEIGHTS, PATHS.cuts):
        path.parent.mkdir(parents=True)
    DATA_CARD.write_text(json.dumps({"classes": list("0123456789"), "image_size": 16, "sha256": {"all": "0"}}))
    for name, count in (("train", 80), ("validation", 30)):
        images, labels = pictures(count, seed=count)
        save_file({"images": images, "labels": labels}, split_file(name))
    save_file(tiny_backbone.state_dict(), BACKBONE_WEIGHTS)
    cuts = cut_points(tiny_backbone, torch.zeros(1, 3, 16, 16))
    PATHS.cuts.write_text(json.dumps([{**cut.to_dict(), "elements": cut.elements, "feature_bytes": 4 * cut.elements} for cut in cuts]))
    toy_profile(DEVICE_MS_PER_MMAC).save(PATHS.device_profile)
    toy_profile(EDGE_MS_PER_MMAC).save(PATHS.edge_profile)
    return workdir


@pytest.fixture
def params(digits_fields):
    digits_fields["supernet"] = {"epochs": 2, "batch_size": 40, "learning_rate": 0.01}
    digits_fields["search"] |= {
        "code_channels": [2, 4],
        "strides": [2],
        "bits": [2, 4],
        "rate_weights": [0.001],
        "keep": [0.5, 1.0],
        "trials": 6,
        "rescored": 2,
    }
    return parse_params(digits_fields)


def written():
    return {path.name: path.read_bytes() for path in sorted(PATHS.supernet.iterdir())}


@pytest.mark.parametrize("codecs", [["rate"], ["rate", "codebook", "multi-rate"]])
def test_a_search_starts_from_what_the_stage_leaves(prepared, params, tracker, codecs):
    params = params.model_copy(update={"search": params.search.model_copy(update={"codecs": codecs})})
    losses = supernet.run(params, "camera", tracker)
    assert set(losses) == {"output", "stem.2", "block1", "down.2", "block2"}
    assert set(written()) == {"curves.csv", *(f"{name}.safetensors" for name in losses)}
    rows = list(csv.DictReader(PATHS.supernet.joinpath("curves.csv").read_text().splitlines()))
    assert [(row["training"], row["epoch"]) for row in rows[:2]] == [("output", "1"), ("output", "2")]
    assert not any(CHECKPOINTS.rglob("*.safetensors")), "nothing is left of trainings that are finished"

    found = search.run(params, "camera", tracker)
    rows = list(csv.DictReader(PATHS.trials.read_text().splitlines()))
    again = [row for row in rows if row["state"] == "rescored"]
    assert {rows[int(row["rescores"])]["label"] for row in again} == {row["label"] for row in again}
    chosen = rows[found["chosen"]["number"]]
    assert chosen["state"] == "rescored" or chosen["cut"] in ("input", "output")
    assert json.loads(PATHS.pareto.read_text())["chosen"] == found["chosen"]["number"]


def test_the_same_inputs_give_the_same_bytes_also_after_an_interruption(prepared, params, tracker, monkeypatch):
    supernet.run(params, "camera", tracker)
    first = written()
    losses = []
    with monkeypatch.context() as patch:
        loss = SplitLesson.loss

        def interrupted(self, *batch):
            losses.append(None)
            if len(losses) == 12:
                raise KeyboardInterrupt
            return loss(self, *batch)

        patch.setattr(SplitLesson, "loss", interrupted)
        with pytest.raises(Interrupted, match=r"down\.2 was interrupted: 1 of 2 epochs.* What came before it \(output, .*\) is finished and kept"):
            supernet.run(params, "camera", tracker)
    assert written() == first, "what an earlier run wrote stays until all is there"
    supernet.run(params, "camera", tracker)
    assert written() == first


def test_without_epochs_each_trial_trains_its_own_codec(prepared, params, tracker):
    assert supernet.run(params.model_copy(update={"supernet": params.supernet.model_copy(update={"epochs": 0})}), "camera", tracker) == {}
    assert set(written()) == {"curves.csv"}
    assert Supernet.load(build_evaluator(params, "camera").problem, PATHS.supernet) is None


def test_nothing_to_prune_and_nothing_to_share_is_no_training(prepared, params, tracker):
    raw = params.model_copy(update={"search": params.search.model_copy(update={"codecs": ["raw-8bit"], "keep": [1.0]})})
    assert supernet.run(raw, "camera", tracker) == {}
    unpruned = params.model_copy(update={"search": params.search.model_copy(update={"keep": [1.0]})})
    assert "output" not in supernet.run(unpruned, "camera", tracker)
