from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CoinferError
from pipeline.paths import DevicePaths
from pipeline.report import print_report

TIMES = {"device_ms": 5.125, "encode_ms": 0.5, "link_ms": 20.25, "decode_ms": 0.25, "edge_ms": 2.0, "total_ms": 28.25}


def mode(label: str, accuracy: float, sends: bool = True) -> dict[str, Any]:
    sizes = (
        {"payload_bits": {"mean": 100.8, "p95": 120.0}, "frame_bytes": {"mean": 29.0, "p95": 31.0}, "wire_bytes": {"mean": 81.0, "p95": 83.0}} if sends else {}
    )
    return {"label": label, "accuracy": accuracy, "predicted_ms": {part: 2 * ms for part, ms in TIMES.items()}, **sizes}


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DevicePaths:
    monkeypatch.chdir(tmp_path)
    paths = DevicePaths("camera")
    metrics = {
        "label": "layer2.0 4ch /2 3bit keep 0.75",
        "chosen": "split",
        "bundle_id": "00ff",
        "link": {"rate_mbps": 0.1, "rtt_ms": 10.0},
        "slowdown": 20.0,
        "edge_slowdown": 1.0,
        "split": mode("split", 0.975),
        "device_only": mode("device-only", 0.98, sends=False),
        "edge_only": mode("WebP q75", 0.9612),
    }
    spread = {part: {"median": ms, "low": ms, "high": ms} for part, ms in TIMES.items()}
    same = {key: metrics[key] for key in ("bundle_id", "link", "slowdown", "edge_slowdown")}
    timing = {**same, "images": 200, "machine": {"coder": "c", "cpu": "Cortex-A76"}, "latency_ms": dict.fromkeys(("split", "device_only", "edge_only"), spread)}
    search = {"floor": 0.95, "device_only": {"feasible": False, "measurement": {"accuracy": 0.97}}, "edge_only": {"feasible": True}}
    for path in (paths.metrics, paths.chosen):
        path.parent.mkdir(parents=True)
    paths.chosen.write_text(json.dumps(search))
    paths.metrics.write_text(json.dumps(metrics))
    paths.timing.write_text(json.dumps(timing))
    return paths


def test_report_shows_candidate_accuracy_bytes_ms_by_part_bundle_and_ui(evaluated: DevicePaths, capsys: pytest.CaptureFixture[str]) -> None:
    print_report("camera")
    out = capsys.readouterr().out
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for line in out.splitlines() if len(cells := line.strip("│┃ ").split("│")) > 1}
    assert "camera: layer2.0 4ch /2 3bit keep 0.75" in out
    assert "split (chosen)" in out
    assert "device-only (does not fit)" in out
    assert "WebP q75" in out
    assert "WebP q75 (" not in out
    assert rows["accuracy, %"] == ["97.50", "98.00", "96.12"]
    assert rows["payload, bytes"] == ["12.6", "-", "12.6"]
    assert rows["on the wire, bytes"] == ["81.0", "-", "81.0"]
    assert rows["device, ms"][0] == "5.12"
    assert rows["total, ms"] == ["28.25"] * 3
    assert rows["predicted total, ms"] == ["56.50"] * 3
    assert "medians of 200 images over 0.1 Mbit/s with 10 ms round trip, device slowed 20x\n" in out
    assert "operating points" not in out
    assert "artifacts/camera/bundle" in out
    assert "make ui" in out
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "\x1b" not in out


def test_a_baseline_below_the_accuracy_floor_is_marked(evaluated: DevicePaths, capsys: pytest.CaptureFixture[str]) -> None:
    below = {"feasible": False, "measurement": {"accuracy": 0.94}}
    evaluated.chosen.write_text(json.dumps(json.loads(evaluated.chosen.read_text()) | {"edge_only": below}))
    print_report("camera")
    assert "WebP q75 (below the floor)" in capsys.readouterr().out


def test_operating_points_are_shown_side_by_side(evaluated: DevicePaths, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads(evaluated.metrics.read_text())
    metrics["split"]["points"] = [
        {"channels": 8, "bits": 4, "accuracy": 0.975, "payload_bits": {"mean": 100.8}, "frame_bytes": {"mean": 25.6}},
        {"channels": 4, "bits": 2, "accuracy": 0.95, "payload_bits": {"mean": 40.0}, "frame_bytes": {"mean": 18.0}},
    ]
    evaluated.metrics.write_text(json.dumps(metrics))
    print_report("camera")
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["0", "8", "4", "97.50", "12.6", "25.6"] in cells
    assert ["1", "4", "2", "95.00", "5.0", "18.0"] in cells


def test_a_coder_without_its_c_extension_is_told_beside_the_times(evaluated: DevicePaths, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated.timing.write_text(json.dumps(json.loads(evaluated.timing.read_text()) | {"machine": {"coder": "python", "cpu": "Cortex-A76"}}))
    print_report("camera")
    assert "device slowed 20x, coder: python, build the C extension (make install)\n" in capsys.readouterr().out


@pytest.mark.parametrize(("profiled", "told"), [("Xeon", True), ("Cortex-A76", False)])
def test_a_profile_of_another_processor_is_told_beside_the_times(evaluated: DevicePaths, capsys: pytest.CaptureFixture[str], profiled: str, told: bool) -> None:
    evaluated.device_profile.parent.mkdir()
    evaluated.device_profile.write_text(json.dumps({"machine": {"cpu": profiled}}))
    print_report("camera")
    assert ("on Cortex-A76; predicted for" in capsys.readouterr().out) == told


def test_a_clone_without_measured_times_sees_predicted_ones(evaluated: DevicePaths, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated.timing.unlink()
    print_report("camera")
    out = capsys.readouterr().out
    assert "times:  predicted" in out
    assert "56.50" in out


@pytest.mark.parametrize("other", [{"bundle_id": "other"}, {"link": {"rate_mbps": 2.0, "rtt_ms": 10.0}}, {"slowdown": 1.0}])
def test_times_of_another_bundle_or_link_are_not_shown(evaluated: DevicePaths, capsys: pytest.CaptureFixture[str], other: dict[str, Any]) -> None:
    evaluated.timing.write_text(json.dumps(json.loads(evaluated.timing.read_text()) | other))
    print_report("camera")
    assert "28.25" not in capsys.readouterr().out


def test_nothing_evaluated_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CoinferError, match="dvc repro"):
        print_report("camera")


def test_an_older_file_says_what_is_missing(evaluated: DevicePaths) -> None:
    evaluated.metrics.write_text(json.dumps({"label": "x"}))
    with pytest.raises(CoinferError, match="--single-item evaluate@camera"):
        print_report("camera")


def test_report_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, pipeline.report; sys.exit(bool({'torch', 'numpy', 'matplotlib', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
