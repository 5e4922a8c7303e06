from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from models.backbones import build_backbone
from pipeline.costs.link import wire_bytes
from pipeline.data import load_split
from pipeline.errors import BundleError, Interrupted
from pipeline.inference import accuracy
from pipeline.params import Params, parse_params
from pipeline.paths import DevicePaths
from pipeline.report import print_report
from pipeline.runtime.bundle import DEVICE_ONLY, EDGE, Bundle
from pipeline.runtime.device import PARTS, DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.images import encode_image
from pipeline.runtime.transport import LoopbackTransport
from pipeline.search.candidate import Candidate
from pipeline.stages import evaluate, export
from pipeline.ways import edges
from tests.conftest import RecordingTracker
from tests.pipeline.stages.finetuned import CLASSES, COUNTS, EDGE_ONLY, SPLIT, write_finetuned

MODES = ["split", "device_only", "edge_only"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles by kind, exported once: each folder is an `artifacts` folder."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture
def bundled(workdir: Path, digits_params: Params, artifacts: Path, request: pytest.FixtureRequest) -> DevicePaths:
    candidate: Candidate = getattr(request, "param", SPLIT)
    kept = artifacts / f"{candidate.kind} {candidate.codec or candidate.image_format} of {len(candidate.keep)} pruned blocks"
    if not kept.exists():
        write_finetuned(digits_params, candidate)
        export.run(digits_params, "camera", RecordingTracker())
        shutil.copytree(workdir / "artifacts", kept)
    shutil.copytree(kept, workdir / "artifacts", dirs_exist_ok=True)
    return DevicePaths("camera")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_test_image_goes_all_three_ways(
    bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = evaluate.run(digits_params, "camera", tracker)
    assert json.loads(bundled.metrics.read_text()) == metrics
    assert metrics["images"] == COUNTS["test"]
    assert metrics["chosen"] == "split"
    assert "points" not in metrics["split"]
    for mode in MODES:
        assert metrics[mode]["accuracy"] * COUNTS["test"] == pytest.approx(round(metrics[mode]["accuracy"] * COUNTS["test"]))
        assert metrics[mode]["predicted_ms"]["total_ms"] == pytest.approx(sum(metrics[mode]["predicted_ms"][part] for part in PARTS[:-1]))
    for mode in ("split", "edge_only"):
        sizes = metrics[mode]
        assert sizes["frame_bytes"]["mean"] == pytest.approx(sizes["payload_bits"]["mean"] / 8 + 13)
        assert sizes["wire_bytes"]["mean"] == pytest.approx(sizes["frame_bytes"]["mean"] + 52)
        # 10 Mbit/s, 1 ms: what search predicted for the link gives way to the bytes that crossed
        expected = 1 + 8 * (sizes["wire_bytes"]["mean"] + wire_bytes(sizes["reply_bytes"])) / 10e3
        assert sizes["predicted_ms"]["link_ms"] == pytest.approx(expected)
    assert metrics["device_only"]["predicted_ms"]["link_ms"] == 0

    timing = json.loads(bundled.timing.read_text())
    assert timing["images"] == digits_params.evaluate.latency_images
    for mode in MODES:
        raw, spread = timing["raw"][mode], timing["latency_ms"][mode]
        assert all(len(raw[part]) == timing["images"] for part in PARTS)
        assert all(spread[part]["low"] <= spread[part]["median"] <= spread[part]["high"] for part in PARTS)
        assert timing["predicted_over_measured"][mode] == pytest.approx(metrics[mode]["predicted_ms"]["total_ms"] / spread["total_ms"]["median"])
    link = metrics["split"]["predicted_ms"]["link_ms"]
    assert min(timing["raw"]["split"]["link_ms"]) >= link * 0.9  # no frame is faster than the emulated link
    assert set(timing["raw"]["device_only"]["link_ms"]) == {0}

    by_rate = rows(bundled.plots / "latency_vs_rate.csv")
    assert list(by_rate[0]) == ["rate_mbps", "chosen", *MODES]
    assert all(row["chosen"] == row["split"] for row in by_rate)
    assert float(by_rate[20]["rate_mbps"]) == pytest.approx(10)
    assert float(by_rate[20]["split"]) == pytest.approx(metrics["split"]["predicted_ms"]["total_ms"], rel=1e-4)
    assert len({row["device_only"] for row in by_rate}) == 1
    confusion = rows(bundled.plots / "confusion.csv")
    assert [row["actual"] for row in confusion] == [CLASSES[i % 3] for i in range(COUNTS["test"])]
    assert sum(row["actual"] == row["predicted"] for row in confusion) == round(metrics["split"]["accuracy"] * COUNTS["test"])

    assert tracker.figures == ["latency_measured.png", "latency_predicted.png", "latency_vs_rate.png"]
    assert any("predicted_over_measured_split" in logged for logged, _ in tracker.metrics)
    assert not multiprocessing.active_children()

    print_report("camera")
    assert "split (chosen)" in capsys.readouterr().out

    locked = {path: path.read_bytes() for path in (bundled.metrics, *bundled.plots.iterdir())}
    evaluate.run(digits_params, "camera", tracker)
    assert {path: path.read_bytes() for path in locked} == locked


@pytest.mark.parametrize(
    "bundled", [Candidate("block1", code_channels=4, stride=2, bits=8, codec="multi-rate", points=((4, 4), (2, 2), (1, 1)))], indirect=True
)
def test_a_split_of_several_operating_points_is_measured_at_each(
    bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = evaluate.run(digits_params, "camera", tracker)
    assert json.loads(bundled.metrics.read_text()) == metrics
    points = metrics["split"]["points"]
    assert [(point["channels"], point["bits"]) for point in points] == [(4, 4), (2, 2), (1, 1)]
    assert {key: points[0][key] for key in ("accuracy", "payload_bits", "frame_bytes")} == {
        key: metrics["split"][key] for key in ("accuracy", "payload_bits", "frame_bytes")
    }
    assert points[0]["frame_bytes"]["mean"] > points[1]["frame_bytes"]["mean"] > points[2]["frame_bytes"]["mean"]
    half, edge = Bundle.load(bundled.bundle), EdgeHalf(Bundle.load(bundled.bundle))
    images, labels = load_split("test")
    for index, point in enumerate(points):
        device = DeviceHalf(half, point=index)
        answers = [device.classify(image.numpy(), LoopbackTransport(edge)) for image in images]
        assert point["frame_bytes"]["mean"] == pytest.approx(sum(answer.frame_bytes for answer in answers) / len(answers))
        assert point["accuracy"] == pytest.approx(sum(answer.logits.argmax() == label for answer, label in zip(answers, labels, strict=True)) / len(answers))
    print_report("camera")
    assert "operating points of the split" in capsys.readouterr().out


@pytest.mark.parametrize("bundled", [EDGE_ONLY], indirect=True)
def test_an_edge_only_choice_is_compared_with_the_device_alone(bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker) -> None:
    metrics = evaluate.run(digits_params, "camera", tracker)
    assert metrics["chosen"] == "edge_only"
    assert metrics["edge_only"]["label"] == "edge-only, WebP q75"
    assert "split" not in metrics


@pytest.mark.parametrize("bundled", [Candidate("input", quality=50, image_format="jpeg-bare")], indirect=True)
def test_a_chosen_jpeg_crosses_as_such(bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker) -> None:
    metrics = evaluate.run(digits_params, "camera", tracker)
    assert (metrics["chosen"], metrics["label"]) == ("edge_only", "JPEG-bare q50")
    sizes = [len(encode_image(image, "jpeg-bare", 50)) for image in load_split("test")[0].numpy()]
    assert metrics["edge_only"]["frame_bytes"]["mean"] == pytest.approx(sum(sizes) / len(sizes) + 13)


@pytest.mark.parametrize("bundled", [Candidate(cut="output")], indirect=True)
def test_a_device_only_choice_is_compared_with_the_edge_alone(bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker) -> None:
    metrics = evaluate.run(digits_params, "camera", tracker)
    assert metrics["chosen"] == "device_only"
    assert list(json.loads(bundled.timing.read_text())["latency_ms"]) == ["device_only", "edge_only"]
    assert "payload_bits" in metrics["edge_only"]


@pytest.mark.parametrize("bundled", [Candidate(cut="output", keep=(("block2", 0.5),))], indirect=True)
def test_a_pruned_device_only_choice_is_compared_with_the_unpruned_network(
    bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker, tmp_path: Path
) -> None:
    metrics = evaluate.run(digits_params, "camera", tracker)
    images, labels = load_split("test")
    size = digits_params.data.image_size
    reference = build_backbone(digits_params.backbone.name, len(CLASSES), size, bundled.reference_weights).eval()
    assert metrics["chosen"] == "device_only"
    assert metrics["accuracy_reference"] == pytest.approx(accuracy(reference, (images, labels)))
    with edges(Bundle.load(bundled.bundle), bundled.reference_onnx, EDGE_ONLY.to_dict(), 1, 1) as served:
        on_edge = served["edge_only"][0].read(EDGE)
    assert on_edge == bundled.reference_onnx.read_bytes()
    assert on_edge != (bundled.bundle / DEVICE_ONLY).read_bytes()


def test_slowdown_and_link_are_emulated(bundled: DevicePaths, digits_fields: dict, tracker: RecordingTracker) -> None:  # type: ignore[type-arg]
    digits_fields["devices"]["camera"]["slowdown"] = 50
    digits_fields["devices"]["camera"]["link"] |= {"rate_mbps": 0.1, "rtt_ms": 30}
    metrics = evaluate.run(parse_params(digits_fields), "camera", tracker)
    timing = json.loads(bundled.timing.read_text())
    assert (metrics["slowdown"], metrics["link"]) == (50, {"rate_mbps": 0.1, "rtt_ms": 30.0})
    # the median image of 3x16x16 pixels needs more than 52 bytes and its reply too
    assert min(timing["raw"]["edge_only"]["link_ms"]) > 30 + 2 * 8 * 52 / 100


def test_ctrl_c_ends_the_edge_processes_and_keeps_nothing(
    bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        assert len(multiprocessing.active_children()) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "ask", interrupted)
    with pytest.raises(Interrupted, match="starts it over"):
        evaluate.run(digits_params, "camera", tracker)
    assert not multiprocessing.active_children()
    assert not bundled.metrics.exists()
    assert not bundled.timing.exists()


def test_an_altered_bundle_is_refused(bundled: DevicePaths, digits_params: Params, tracker: RecordingTracker) -> None:
    half = bundled.bundle / "edge.onnx"
    data = bytearray(half.read_bytes())
    data[len(data) // 2] ^= 1
    half.write_bytes(data)
    with pytest.raises(BundleError, match=r"edge\.onnx"):
        evaluate.run(digits_params, "camera", tracker)
