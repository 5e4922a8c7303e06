from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.data import load_split
from pipeline.errors import Interrupted, ModelError, ParamsError
from pipeline.inference import accuracy, predict_logits
from pipeline.params import Params, parse_params
from pipeline.paths import BACKBONE_CURVES, BACKBONE_METRICS, BACKBONE_WEIGHTS, CHECKPOINTS
from pipeline.stages import prepare, pretrain
from tests.tiny import tiny_backbone


def changed(fields: dict[str, Any], **sections: dict[str, Any]) -> Params:
    return parse_params({**fields, **{name: {**fields[name], **values} for name, values in sections.items()}})


@pytest.fixture
def digits(workdir: Path, digits_params: Params, tracker: Any) -> Path:
    prepare.run(digits_params, tracker)
    tracker.metrics.clear()
    return workdir


def test_it_leaves_weights_metrics_and_curves(digits: Path, digits_params: Params, tracker: Any) -> None:
    metrics = pretrain.run(digits_params, tracker)
    assert json.loads(BACKBONE_METRICS.read_text()) == metrics
    network = tiny_backbone(10, 16)
    network.load_state_dict(load_file(BACKBONE_WEIGHTS))
    assert accuracy(network, load_split("validation")) == metrics["accuracy_validation"] > 0.2
    assert BACKBONE_CURVES.read_text().splitlines()[0] == "epoch,loss,accuracy_validation"
    assert len(BACKBONE_CURVES.read_text().splitlines()) == 2
    assert [step for _, step in tracker.metrics] == [1, None]
    assert not list(CHECKPOINTS.rglob("*.*"))


def test_training_never_makes_given_weights_worse(digits: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    pretrain.run(parse_params(digits_fields), tracker)
    good = Path("good.safetensors")
    good.write_bytes(BACKBONE_WEIGHTS.read_bytes())
    ruin = changed(digits_fields, backbone={"weights": str(good)}, pretrain={"learning_rate": 50.0, "ema_decay": 0.0})
    metrics = pretrain.run(ruin, tracker)
    assert metrics["accuracy_validation"] == metrics["accuracy_start"]
    assert BACKBONE_WEIGHTS.read_bytes() == good.read_bytes()


def test_without_epochs_given_weights_are_checked_and_passed_on(digits: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    torch.manual_seed(5)
    state = tiny_backbone(10, 16).state_dict()
    save_file(state, "given.safetensors")
    metrics = pretrain.run(changed(digits_fields, backbone={"weights": "given.safetensors"}, pretrain={"epochs": 0}), tracker)
    assert metrics["epochs"] == 0
    assert metrics["accuracy_validation"] == metrics["accuracy_start"]
    kept = load_file(BACKBONE_WEIGHTS)
    assert all(torch.equal(kept[name], state[name]) for name in state)
    assert len(BACKBONE_CURVES.read_text().splitlines()) == 1


def test_nothing_to_train_and_nothing_to_load_is_refused(digits: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    with pytest.raises(ParamsError, match=r"pretrain\.epochs is 0 and backbone\.weights is null"):
        pretrain.run(changed(digits_fields, pretrain={"epochs": 0}), tracker)


def test_weights_of_another_network_are_refused(digits: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    save_file({"other.weight": torch.zeros(2)}, "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.weight"):
        pretrain.run(changed(digits_fields, backbone={"weights": "other.safetensors"}), tracker)


def test_the_backbone_learns_what_its_teachers_say(digits: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    """They say "3" to every image, which no label does."""
    student, images = tiny_backbone(10, 16), load_split("validation")[0]
    state = tiny_backbone(10, 16).state_dict() | {"head.weight": torch.zeros(10, student.head.in_features), "head.bias": 8.0 * torch.eye(10)[3]}
    save_file(state, "stubborn.safetensors")

    def threes(weight: float) -> int:
        taught = {"teachers": {"stubborn.safetensors": digits_fields["backbone"]["name"]}, "distill_logits": weight, "learning_rate": 0.02}
        pretrain.run(changed(digits_fields, pretrain=taught), tracker)
        student.load_state_dict(load_file(BACKBONE_WEIGHTS))
        return int((predict_logits(student, images).argmax(1) == 3).sum())

    assert threes(5.0) > 0.9 * len(images) > threes(0.0)


def test_a_missing_teacher_is_named(digits: Path, digits_fields: dict[str, Any], tracker: Any) -> None:
    with pytest.raises(ModelError, match="none\\.safetensors"):
        pretrain.run(changed(digits_fields, pretrain={"teachers": {"none.safetensors": "resnet8"}}), tracker)


def test_an_interrupted_stage_goes_on_to_the_same_weights(digits: Path, digits_fields: dict[str, Any], tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = changed(digits_fields, pretrain={"epochs": 2})
    pretrain.run(params, tracker)
    whole = BACKBONE_WEIGHTS.read_bytes()
    BACKBONE_WEIGHTS.unlink()

    class Stops(type(tracker)):  # type: ignore[misc]
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if step == 1:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"1 of 2 epochs are kept in \.coinfer/checkpoints/pretrain/.*`dvc repro` goes on"):
        pretrain.run(params, Stops())
    assert not BACKBONE_WEIGHTS.exists()
    pretrain.run(params, tracker)
    assert BACKBONE_WEIGHTS.read_bytes() == whole
