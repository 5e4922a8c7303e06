"""The short table that ends `make repro`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.errors import CoinferError
from pipeline.files import read_json
from pipeline.paths import DevicePaths

MODES = ("split", "device_only", "edge_only")
PLAIN_WIDTH = 100


def print_report(device: str) -> None:
    """Print what was chosen for `device` and what it costs beside device-only and edge-only, on the test images.

    Times are the measured medians. A clone that pulled the results without measuring has none, and is shown the predicted ones.

    Raises:
        CoinferError: nothing has been evaluated yet.
    """
    paths = DevicePaths(device)
    metrics, search = read_json(paths.metrics, "the evaluation"), read_json(paths.chosen, "the chosen candidate")
    timing = measured_times(paths, metrics)
    try:
        tables, times = [_table(device, metrics, timing, search), *_points(metrics)], [_how_timed(device, metrics, timing), *_how_predicted(paths, timing)]
    except (KeyError, TypeError, AttributeError) as error:
        raise CoinferError(
            f"{paths.metrics} or {paths.timing} lacks {error}; run `dvc repro --force --single-item evaluate@{device}` to write them again."
        ) from error
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    for table in tables:
        console.print(table)
    for line in times:
        console.print(line, soft_wrap=True)
    console.print(f"bundle: {paths.bundle}", soft_wrap=True)
    console.print("runs:   `make ui` opens them in MLflow", soft_wrap=True)


def measured_times(paths: DevicePaths, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measured times that belong to `metrics`; None where there are none, or only those of another bundle, link or slowdown."""
    timing: dict[str, Any] | None = read_json(paths.timing, "the measured times") if paths.timing.exists() else None
    return timing if timing and all(timing.get(key) == metrics.get(key) for key in ("bundle_id", "link", "slowdown", "edge_slowdown")) else None


def heading(mode: str, metrics: Mapping[str, Any], search: Mapping[str, Any]) -> str:
    """What stands above the column of `mode`: its label, and whether the search chose it or could not have, on validation."""
    label = str(metrics[mode]["label"])
    if mode == metrics["chosen"]:
        return f"{label} (chosen)"
    baseline = search.get(mode)  # none where the split is not the choice
    if baseline is None or baseline["feasible"]:
        return label
    return f"{label} (below the floor)" if baseline["measurement"]["accuracy"] < search["floor"] else f"{label} (does not fit)"


def _table(device: str, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None, search: Mapping[str, Any]) -> Table:
    modes = [mode for mode in MODES if mode in metrics]
    table = Table(title=f"{device}: {metrics['label']}", title_justify="left", title_style="bold")
    table.add_column("per image")
    for mode in modes:
        table.add_column(heading(mode, metrics, search), justify="right")

    def row(name: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        table.add_row(name, *(cell(metrics[mode]) for mode in modes))

    row("accuracy, %", lambda m: f"{100 * m['accuracy']:.2f}")
    row("payload, bytes", lambda m: f"{m['payload_bits']['mean'] / 8:.1f}" if "payload_bits" in m else "-")
    row("on the wire, bytes", lambda m: f"{m['wire_bytes']['mean']:.1f}" if "wire_bytes" in m else "-")
    table.add_section()
    for part in ("device_ms", "encode_ms", "link_ms", "decode_ms", "edge_ms", "total_ms"):
        if part == "total_ms":
            table.add_section()
        values = [timing["latency_ms"][mode][part]["median"] if timing else metrics[mode]["predicted_ms"][part] for mode in modes]
        table.add_row(f"{part.removesuffix('_ms')}, ms", *(f"{value:.2f}" for value in values))
    if timing:
        row("predicted total, ms", lambda m: f"{m['predicted_ms']['total_ms']:.2f}")
    return table


def _points(metrics: Mapping[str, Any]) -> list[Table]:
    """What a split does at each of its operating points; nothing where it has one."""
    points = metrics.get("split", {}).get("points")
    if not points:
        return []
    table = Table(title="operating points of the split", title_justify="left", title_style="bold")
    for name in ("--point", "channels", "bits", "accuracy, %", "payload, bytes", "frame, bytes"):
        table.add_column(name, justify="right")
    for index, point in enumerate(points):
        sizes = f"{point['payload_bits']['mean'] / 8:.1f}", f"{point['frame_bytes']['mean']:.1f}"
        table.add_row(str(index), str(point["channels"]), str(point["bits"]), f"{100 * point['accuracy']:.2f}", *sizes)
    return [table]


def _how_timed(device: str, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None) -> str:
    link = metrics["link"]
    where = f"over {link['rate_mbps']:g} Mbit/s with {link['rtt_ms']:g} ms round trip, device slowed {metrics['slowdown']:g}x"
    if timing is None:
        return f"times:  predicted, {where}; `dvc repro --force --single-item evaluate@{device}` measures them here"
    coder = ", coder: python, build the C extension (make install)" if "split" in metrics and timing["machine"]["coder"] == "python" else ""
    return f"times:  medians of {timing['images']} images {where}{coder}"


def _how_predicted(paths: DevicePaths, timing: Mapping[str, Any] | None) -> list[str]:
    """A line where the measured times are of another processor than the profile, and so need not be near the predicted ones."""
    profiled = read_json(paths.device_profile, "the device profile").get("machine", {}).get("cpu") if paths.device_profile.exists() else None
    if timing is None or profiled in (None, timing["machine"]["cpu"]):
        return []
    return [f"        on {timing['machine']['cpu']}; predicted for {profiled}, which the profile was measured on (docs/own-device.md)"]
