from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from pipeline import parity
from pipeline.data import Sent
from pipeline.errors import CoinferError, FrameError, Interrupted, ModelError, ParityError
from pipeline.inference import predict_logits
from pipeline.params import Params
from pipeline.parity import check_split, check_whole
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.images import Format
from pipeline.runtime.preprocess import Preprocessing
from pipeline.runtime.transport import LoopbackTransport
from pipeline.search.candidate import Candidate
from pipeline.stages import export
from pipeline.training import weights_bytes
from tests.conftest import RecordingTracker
from tests.pipeline.stages.finetuned import CLASSES, COUNTS, DEVICE_ONLY, EDGE_ONLY, SPLIT, write_finetuned
from tests.tiny import tiny_backbone as build_tiny


def test_split_passes_the_gate_and_becomes_a_bundle_that_answers(workdir: Path, digits_params: Params, tracker: RecordingTracker) -> None:
    candidate = Candidate(**{**SPLIT.__dict__, "keep": (("block1", 0.5),)})
    paths = write_finetuned(digits_params, candidate)
    parity = export.run(digits_params, "camera", tracker)

    assert parity["images"] == parity["split"]["frames_exact"] == COUNTS["validation"]
    assert parity["split"]["symbols"] == COUNTS["validation"] * 4 * 8 * 8
    assert parity["split"]["symbols_differing"] <= parity["split"]["symbols_allowed"]
    assert parity["split"]["top1_equal"] == parity["reference"]["top1_equal"] == 1
    assert json.loads(paths.parity.read_text()) == parity

    bundle = Bundle.load(paths.bundle)
    assert bundle.classes == CLASSES
    assert bundle.manifest["plan"]
    assert bundle.manifest["candidate"] == candidate.to_dict()
    assert bundle.manifest["opset"] == 20
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16), np.uint8)
    answer = DeviceHalf(bundle).classify(pixels, LoopbackTransport(EdgeHalf(bundle)))
    assert answer.logits.shape == (3,)

    assert sorted(tracker.models) == ["device", "device-only", "edge"]
    text = b"".join(path.read_bytes() for path in sorted(paths.bundle.iterdir()))
    for where in (str(workdir), str(Path(__file__).parents[3])):
        assert where.encode() not in text

    _gate_refuses_other_weights(paths.bundle, bundle)


def test_an_int8_device_half_is_judged_by_itself_and_answers(
    workdir: Path, digits_params: Params, tracker: RecordingTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_finetuned(digits_params, Candidate(**{**SPLIT.__dict__, "precision": "int8"}))
    parity = export.run(digits_params, "camera", tracker)
    assert parity["split"]["symbols_differing"] <= parity["split"]["symbols_allowed"]
    assert parity["split"]["top1_equal"] == 1
    assert parity["split"]["top1_equal_unquantised"] > 0.6
    assert "ms" not in paths.parity.read_text()
    said, (ratio,) = capsys.readouterr(), [logged["fp32_over_int8"] for logged, _ in tracker.metrics if "fp32_over_int8" in logged]
    assert f"{ratio:.2f} times as fast on this machine" in said.out
    assert ("block1 4ch /2 3bit int8 is slower here than the fp32 one; set search.precision to [fp32]" in said.err) == (ratio < 1)
    bundle = Bundle.load(paths.bundle)
    assert bundle.manifest["candidate"]["precision"] == "int8"
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16), np.uint8)
    assert DeviceHalf(bundle).classify(pixels, LoopbackTransport(EdgeHalf(bundle))).logits.shape == (3,)
    halves = {name: bundle.read(name) for name in ("device.onnx", "edge.onnx")}
    write_finetuned(digits_params, SPLIT)
    export.run(digits_params, "camera", tracker)
    whole = Bundle.load(paths.bundle)
    assert whole.read("edge.onnx") == halves["edge.onnx"], "the edge half stays as it is"
    assert whole.read("device.onnx") != halves["device.onnx"]


def test_a_codebook_that_collapsed_is_named(workdir: Path, digits_params: Params, tracker: RecordingTracker, capsys: pytest.CaptureFixture[str]) -> None:
    candidate = Candidate("block1", code_channels=4, stride=2, bits=3, codec="codebook")
    paths = write_finetuned(digits_params, candidate)
    assert export.run(digits_params, "camera", tracker)["codebook"]["values_used"] >= 4
    assert capsys.readouterr().err == ""

    def give(values: torch.Tensor) -> None:
        names = ("codec.values", "codec.quantise.values", "codec.dequantise.values")
        save_file(load_file(paths.split_weights) | {name: values.clone() for name in names}, paths.split_weights)

    give(torch.tensor([0.4, 0.6, 5, 5.2, 5.4, 5.6, 5.8, 6]))  # the clamp lets nothing above 1 through
    assert export.run(digits_params, "camera", tracker)["codebook"]["values_used"] == 2
    assert capsys.readouterr().err == (
        "coinfer: the codebook of block1 4ch /2 3bit codebook has collapsed in part: the training images use 2 of its 8 values; "
        "lower codec.commitment, or take fewer bits (search.bits).\n"
    )
    give(torch.linspace(5, 6, 8))
    with pytest.raises(ModelError, match=r"the codebook of block1 4ch /2 3bit codebook has collapsed: .* the same of its 8 values; lower codec\.commitment"):
        export.run(digits_params, "camera", tracker)


@pytest.mark.parametrize("kind", ["jscc-awgn", "jscc-bec", "jscc-bsc", "raw-fp32"])
def test_what_no_frame_can_carry_is_refused(workdir: Path, digits_params: Params, tracker: RecordingTracker, kind: str) -> None:
    size = (8, 1) if kind == "raw-fp32" else (4, 2)
    paths = write_finetuned(digits_params, Candidate("block1", code_channels=size[0], stride=size[1], bits=8, codec=kind))
    with pytest.raises(
        ModelError, match=rf"codec {kind} sends no symbols a frame could carry and can only be evaluated; leave it out of search\.codecs to export"
    ):
        export.run(digits_params, "camera", tracker)
    assert not paths.bundle.exists()


def test_a_raw_split_passes_the_gate(workdir: Path, digits_params: Params, tracker: RecordingTracker) -> None:
    paths = write_finetuned(digits_params, Candidate("block1", code_channels=8, stride=1, bits=8, codec="raw-8bit"))
    weights = load_file(paths.split_weights)
    for name, value in (("low", 0.0), ("high", 3.0)):
        weights |= {key: torch.tensor(value) for key in weights if key.endswith(f"range.{name}")}
    save_file(weights, paths.split_weights)
    parity = export.run(digits_params, "camera", tracker)
    assert parity["split"]["top1_equal"] == 1


def test_a_multi_rate_split_passes_the_gate_at_every_point(workdir: Path, digits_params: Params, tracker: RecordingTracker) -> None:
    candidate = Candidate("block1", code_channels=4, stride=2, bits=8, codec="multi-rate", points=((4, 4), (2, 2)))
    paths = write_finetuned(digits_params, candidate)
    parity = export.run(digits_params, "camera", tracker)
    assert parity["split"]["frames_exact"] == 2 * COUNTS["validation"]
    assert parity["split"]["top1_equal"] == 1
    bundle = Bundle.load(paths.bundle)
    assert [(point.channels, point.bits) for point in bundle.points] == [(4, 4), (2, 2)]
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16), np.uint8)
    answers = [DeviceHalf(bundle, point=point).classify(pixels, LoopbackTransport(EdgeHalf(bundle))) for point in (0, 1)]
    assert answers[1].frame_bytes < answers[0].frame_bytes


def _gate_refuses_other_weights(folder: Path, bundle: Bundle) -> None:
    """Symbols and logits are not those of another network."""
    halves = [(folder / name).read_bytes() for name in ("device.onnx", "edge.onnx")]
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(1)
    other = build_tiny(num_classes=3, image_size=16).eval()
    example = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ParityError, match=r"device.onnx gives \d+ of 1024 symbols unlike the trained network.*no bundle is written"):
        check_split(build_split(other, example, "block1", CodecSpec("uniform", 4, 2, 3)), *halves, bundle.points, Preprocessing(16), images)
    with pytest.raises(ParityError, match=r"device-only.onnx gives logits that differ by up to"):
        check_whole(other, (folder / "device-only.onnx").read_bytes(), "device-only.onnx", Preprocessing(16), images)


def refused(frame: bytes) -> None:
    raise FrameError("its checksum is wrong")


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("decode", lambda payload, shape, tables: np.zeros(shape, np.uint8), "the frame of validation image 0 decodes to other symbols"),
        ("unpack", refused, r"image 0 is refused \(its checksum is wrong\)"),
        ("predict_logits", None, r"agrees with the trained network's top-1 on 0\.00% of the validation images, less than 99\.9%"),
    ],
)
def test_the_gate_refuses_a_chain_that_answers_otherwise(
    workdir: Path, digits_params: Params, tracker: RecordingTracker, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, words: str
) -> None:
    """A coder that alters symbols, a frame that cannot be read, and halves that are exact one by one but disagree as a chain."""
    paths = write_finetuned(digits_params, SPLIT)
    answers = parity.predict_logits

    def other_answers(network: Any, images: torch.Tensor) -> torch.Tensor:
        return answers(network, images).roll(1, 1) if isinstance(network, CoInference) else answers(network, images)

    monkeypatch.setattr(parity, name, broken or other_answers)
    with pytest.raises(ParityError, match=words):
        export.run(digits_params, "camera", tracker)
    assert not paths.bundle.exists()


def test_edge_half_of_other_weights_stops_the_stage_before_a_bundle(
    workdir: Path, digits_params: Params, tracker: RecordingTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_finetuned(digits_params, SPLIT)
    halves = export._halves

    def broken(network: CoInference, example: torch.Tensor) -> dict[str, bytes]:
        exported = halves(network, example)
        with torch.no_grad():
            network.tail.get_parameter("head.bias").add_(1)
        return exported

    monkeypatch.setattr(export, "_halves", broken)
    with pytest.raises(ParityError, match=r"edge.onnx gives logits that differ by up to 1 .*no bundle is written"):
        export.run(digits_params, "camera", tracker)
    assert not paths.bundle.exists()
    assert not paths.parity.exists()


def test_pruned_device_only_bundle_holds_the_pruned_network(workdir: Path, digits_params: Params, tracker: RecordingTracker) -> None:
    paths = write_finetuned(digits_params, Candidate(cut="output", keep=(("block2", 0.5),)))
    parity = export.run(digits_params, "camera", tracker)
    assert set(parity) == {"images", "reference", "device_only"}
    assert paths.reference_onnx.read_bytes() != (paths.bundle / "device-only.onnx").read_bytes()
    bundle = Bundle.load(paths.bundle)
    assert bundle.kind == "device-only"
    assert DeviceHalf(bundle).classify_locally(np.zeros((3, 16, 16), np.uint8)).logits.shape == (3,)


@pytest.mark.parametrize("image_format", ["webp", "jpeg", "jpeg-bare"])
def test_edge_only_bundle_runs_on_the_edge_what_was_trained_for_it(
    workdir: Path, digits_params: Params, tracker: RecordingTracker, image_format: Format
) -> None:
    paths = write_finetuned(digits_params, replace(EDGE_ONLY, image_format=image_format))
    trained = build_tiny(num_classes=3, image_size=16).eval()
    paths.split_weights.write_bytes(weights_bytes(trained))
    export.run(digits_params, "camera", tracker)
    bundle = Bundle.load(paths.bundle)
    assert (bundle.kind, bundle.quality, bundle.image_format) == ("edge-only", 75, image_format)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16), np.uint8)
    logits = DeviceHalf(bundle).classify(pixels, LoopbackTransport(EdgeHalf(bundle))).logits
    wanted = predict_logits(trained, Sent(image_format, 75)(torch.from_numpy(pixels[None])))
    np.testing.assert_allclose(logits, wanted[0].numpy(), atol=1e-4)
    assert (paths.bundle / "device-only.onnx").read_bytes() == paths.reference_onnx.read_bytes()


def test_missing_weights_say_what_to_run(workdir: Path, digits_params: Params, tracker: RecordingTracker) -> None:
    paths = write_finetuned(digits_params, DEVICE_ONLY)
    paths.reference_weights.unlink()
    with pytest.raises(CoinferError, match=r"reference.safetensors are missing .* run `dvc repro`"):
        export.run(digits_params, "camera", tracker)
    paths.split_spec.unlink()
    with pytest.raises(CoinferError, match="run `dvc repro`"):
        export.run(digits_params, "camera", tracker)


def test_ctrl_c_leaves_no_bundle(workdir: Path, digits_params: Params, tracker: RecordingTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_finetuned(digits_params, SPLIT)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_halves", interrupted)
    with pytest.raises(Interrupted, match="starts it over"):
        export.run(digits_params, "camera", tracker)
    assert not paths.bundle.exists()
