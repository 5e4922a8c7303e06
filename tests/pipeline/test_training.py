from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from models.codec import CodecSpec, RateCodec
from models.coinference import CoInference, build_split
from models.cutting import split
from pipeline.data import normalise
from pipeline.distilling import Distiller, Ensemble
from pipeline.errors import CoinferError, Interrupted, ParamsError
from pipeline.inference import accuracy, predict_logits
from pipeline.losses import feature_loss
from pipeline.params import Finetune, Precision
from pipeline.split_distilling import SplitDistiller
from pipeline.training import Classifier, DataModule, computes_bf16, fit, weights_bytes

Row = dict[str, float]


class Net(nn.Module):
    """Conv, BN, dropout: everything whose state a resumed training must bring back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def settings(**fields: object) -> Finetune:
    return Finetune.model_validate({"epochs": 4, "learning_rate": 0.1, "batch_size": 16, "crop_padding": 1, "ema_decay": 0.9} | fields)


def coloured(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is their brightest channel: learnt in a few steps."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 100
    return images, labels


def classifier(**fields: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(Net(), settings(**fields), 0.05)


def train(module: Classifier, folder: Path | None = None, log: object = None, epochs: int = 4) -> list[Row]:
    data = DataModule(coloured(96), coloured(30), module.settings, 3)
    return fit(module, data, name="pretrain", epochs=epochs, checkpoint_dir=folder, threads=1, precision="fp32", log=log or (lambda row: None))  # type: ignore[arg-type]


class Breaks(Classifier):
    """Ctrl-C in the middle of epoch `1 + at // 6`."""

    at = 15

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == self.at:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


def interrupt_at(epoch: int, error: BaseException) -> object:
    def log(row: Row) -> None:
        if row["epoch"] == epoch:
            raise error

    return log


def test_it_learns_and_reports_each_epoch() -> None:
    module, rows = classifier(), []
    history = train(module, log=rows.append)
    assert rows == history
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < history[0]["loss"]
    assert accuracy(module.network, coloured(30)) > 0.9


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = classifier(), classifier()
    assert train(first) == train(second)
    assert weights_bytes(first.network) == weights_bytes(second.network)


@pytest.mark.parametrize(
    ("epoch", "error", "ema_decay"),
    [(1, KeyboardInterrupt(), 0.9), (3, RuntimeError("power cut"), 0.9), (3, KeyboardInterrupt(), 0.0), (4, KeyboardInterrupt(), 0.9)],
)
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, epoch: int, error: BaseException, ema_decay: float) -> None:
    whole = classifier(ema_decay=ema_decay)
    history = train(whole)
    with pytest.raises((RuntimeError, Interrupted)):
        train(classifier(ema_decay=ema_decay), tmp_path, interrupt_at(epoch, error))
    assert (tmp_path / "last.ckpt").exists()
    resumed, rows = classifier(ema_decay=ema_decay), []
    assert train(resumed, tmp_path, rows.append) == history
    assert rows == history
    assert weights_bytes(resumed.network) == weights_bytes(whole.network)


def test_an_interruption_within_an_epoch_repeats_that_epoch(tmp_path: Path) -> None:
    whole = classifier()
    train(whole)
    torch.manual_seed(0)
    with pytest.raises(Interrupted, match=r"pretrain was interrupted: 2 of 4 epochs are kept in .*; `dvc repro` goes on from there"):
        train(Breaks(Net(), settings(), 0.05), tmp_path)
    resumed = classifier()
    train(resumed, tmp_path)
    assert weights_bytes(resumed.network) == weights_bytes(whole.network)


def test_ctrl_c_before_the_first_checkpoint_says_so_and_works_again_afterwards(tmp_path: Path) -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    early = Breaks(Net(), settings(), 0.05)
    early.at = 2
    with pytest.raises(Interrupted, match="before its first epoch was kept; `dvc repro` starts it over"):
        train(early, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_training_is_not_done_twice(tmp_path: Path) -> None:
    first, second, rows = classifier(), classifier(), []
    history = train(first, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["finished.safetensors"]
    assert train(second, tmp_path, rows.append) == history == rows
    assert weights_bytes(first.network) == weights_bytes(second.network)


@pytest.mark.parametrize(("epochs_before", "name"), [(4, "finished.safetensors"), (3, "last.ckpt")])
def test_a_damaged_state_is_named(tmp_path: Path, epochs_before: int, name: str) -> None:
    if epochs_before == 4:
        train(classifier(), tmp_path)
    else:
        with pytest.raises(RuntimeError):
            train(classifier(), tmp_path, interrupt_at(3, RuntimeError()))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(CoinferError, match=f"{name} cannot be read .*; delete it and run `dvc repro` again"):
        train(classifier(), tmp_path)


def test_a_diverging_training_stops_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CoinferError, match=r"pretrain: the loss is (nan|inf) in epoch \d; choose a smaller learning_rate"):
        train(classifier(learning_rate=1e30), tmp_path)


def test_the_user_sees_nothing_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    train(classifier())
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_weight_decay_spares_biases_and_batch_norm() -> None:
    module = classifier(learning_rate=0.01, weight_decay=10.0, ema_decay=0.0, epochs=6)
    module.network.body[1].weight.requires_grad_(False)
    module.network.fc.bias.data.fill_(1.0)
    module.label_smoothing = 0.0
    train(module, epochs=6)
    assert module.network.fc.weight.abs().max() < 0.1
    assert module.network.fc.bias.abs().min() > 0.9


def test_averaged_weights_are_kept(tmp_path: Path) -> None:
    averaged, plain = classifier(ema_decay=0.99), classifier(ema_decay=0.0)
    train(averaged)
    train(plain)
    assert not torch.equal(averaged.network.fc.weight, plain.network.fc.weight)
    assert not torch.equal(averaged.network.body[1].running_mean, plain.network.body[1].running_mean)


def test_the_validated_weights_are_the_kept_ones() -> None:
    module = classifier()
    assert train(module, epochs=2)[-1]["accuracy_validation"] == accuracy(module.network, coloured(30))


def test_distilling_moves_a_student_to_its_teacher_and_leaves_the_teacher_alone() -> None:
    torch.manual_seed(1)
    teacher, student = Net(), Net()
    before = weights_bytes(teacher)
    images, _ = coloured(30)
    far = (predict_logits(student, images) - predict_logits(teacher, images)).abs().mean()
    distiller = Distiller(student, teacher, settings(epochs=8, distill_logits=20.0), 0.0)
    assert not any("teacher" in name for name in distiller.state_dict())
    train(distiller, epochs=8)
    assert weights_bytes(teacher) == before
    assert (predict_logits(student, images) - predict_logits(teacher, images)).abs().mean() < far


def test_frozen_parts_keep_weights_and_statistics_and_can_train_again(tmp_path: Path) -> None:
    module = classifier()
    module.frozen = (module.network.body,)
    body, head = weights_bytes(module.network.body), weights_bytes(module.network.fc)
    train(module, tmp_path)
    assert weights_bytes(module.network.body) == body
    assert weights_bytes(module.network.fc) != head
    assert all(parameter.requires_grad for parameter in module.network.parameters())


def test_an_interrupted_frozen_phase_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def half_frozen() -> Classifier:
        module = classifier()
        module.frozen = (module.network.body,)
        return module

    whole, resumed = half_frozen(), half_frozen()
    train(whole)
    with pytest.raises(RuntimeError):
        train(half_frozen(), tmp_path, interrupt_at(2, RuntimeError("power cut")))
    train(resumed, tmp_path)
    assert weights_bytes(resumed.network) == weights_bytes(whole.network)


def test_a_split_learns_the_teachers_feature_and_to_spend_fewer_bits(tiny_backbone: nn.Module) -> None:
    images, labels = coloured(96)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    example = torch.zeros(1, 3, 16, 16)
    spent = []
    for rate_weight in (0.0, 0.01):
        torch.manual_seed(0)
        network = build_split(tiny_backbone, example, "block1", CodecSpec("rate", 4, 2, 4, rate_weight)).train()
        data = DataModule((images, labels), (images[:30], labels[:30]), settings(), 3)
        wanted = split(tiny_backbone, example, "block1")[0](normalise(images))

        def unlike(network: CoInference = network, wanted: torch.Tensor = wanted) -> float:
            with torch.no_grad():
                return float(feature_loss(network.eval().run(normalise(images)).decoded, wanted))

        before = unlike()
        lesson = SplitDistiller(network.train(), split(tiny_backbone, example, "block1"), settings(distill_feature=1.0), 0.0)
        fit(lesson, data, name="split", epochs=4, checkpoint_dir=None, threads=1, precision="fp32", log=lambda row: None)
        assert unlike() < 0.7 * before
        codec = network.codec
        assert isinstance(codec, RateCodec)
        with torch.no_grad():
            spent.append(float(codec.bits_of(network.device_half()(normalise(images))).sum()) / len(images))
    assert spent[1] < 0.8 * spent[0]


def test_a_student_that_sees_less_is_taught_by_what_the_teacher_sees() -> None:
    def dark(images: torch.Tensor) -> torch.Tensor:
        return images // 8

    module = classifier()
    train(module, epochs=8)
    teacher, (images, labels) = module.network, coloured(96)
    student = copy.deepcopy(teacher)
    data = DataModule((images, labels), (images, labels), settings(), 3, dark)
    lesson = Distiller(student, teacher, settings(distill_logits=2.0), 0.0)
    history = fit(lesson, data, name="student", epochs=12, checkpoint_dir=None, threads=1, precision="fp32", log=lambda row: None)
    assert history[-1]["accuracy_validation"] == accuracy(student, (dark(images), labels)) > accuracy(teacher, (dark(images), labels))
    wanted = predict_logits(teacher, images)
    assert (predict_logits(student, dark(images)) - wanted).abs().mean() < (predict_logits(teacher, dark(images)) - wanted).abs().mean()


def test_an_ensemble_answers_with_the_mean_of_its_networks() -> None:
    torch.manual_seed(2)
    networks, (images, _) = [Net(), Net()], coloured(5)
    one, other = (predict_logits(network, images) for network in networks)
    assert torch.allclose(predict_logits(Ensemble(networks), images), (one + other) / 2)


def test_a_border_as_wide_as_the_image_is_refused() -> None:
    with pytest.raises(ParamsError, match="crop_padding is 8"):
        DataModule(coloured(4), coloured(4), settings(crop_padding=8), 0)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("bf16", True)])
def test_a_stated_precision_is_obeyed(precision: Precision, expected: bool) -> None:
    assert computes_bf16(Net(), precision) is expected


def test_auto_precision_stays_fp32_for_depthwise_networks() -> None:
    assert computes_bf16(nn.Conv2d(4, 4, 3, groups=4), "auto") is False
