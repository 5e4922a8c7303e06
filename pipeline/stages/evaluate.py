"""evaluate: the bundle on the test images, once, through two processes: accuracy and bytes of every image, then milliseconds over the emulated link."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.costs.link import Link, link_ms, reply_frame_bytes, wire_bytes
from pipeline.data import load_split
from pipeline.errors import Interrupted
from pipeline.files import atomic_directory, atomic_write_json, read_json
from pipeline.machine import describe_machine
from pipeline.params import Device, Params
from pipeline.paths import DevicePaths
from pipeline.plots import latency_against_rate, latency_breakdown, write_csv
from pipeline.runtime.bundle import Bundle, open_session
from pipeline.runtime.device import PARTS, Answer
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.search.candidate import Candidate
from pipeline.ways import ask, edges, ways

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

BATCH = 256


def run(params: Params, device: str, tracker: Tracker) -> dict[str, Any]:
    """Write evaluate/metrics.json (nothing timed), evaluate/plots/*.csv and timing.json of `device`; return the metrics.

    Every test image is classified by the chosen split (if one was chosen), by the device alone, which runs the bundle's device-only.onnx, and by the edge
    alone, which runs the reference network on an image as search found cheapest to send. A split of several operating points goes through at
    each of them; for all else the first stands for it. The first `evaluate.latency_images` test images are then timed with the emulated link and slowdowns,
    the three ways in turns, so that what else this machine does falls on all of them.

    Raises:
        CoinferError: an input is missing or damaged, the edge process did not start, or an out cannot be written.
        Interrupted: Ctrl-C; nothing is kept.
    """
    settings, paths = params.device(device), DevicePaths(device)
    bundle, search = Bundle.load(paths.bundle), read_json(paths.chosen, "the chosen candidate")
    threads, edge_threads = (int(read_json(path, "a profile")["threads"]) for path in (paths.device_profile, paths.edge_profile))
    tensors = load_split("test")
    images, labels = tensors[0].numpy(), tensors[1].numpy()
    link = Link(settings.link.rate_mbps, settings.link.rtt_ms)
    timed, warmup = images[: params.evaluate.latency_images], params.evaluate.warmup_images
    try:
        with edges(bundle, paths.reference_onnx, search["edge_only"]["candidate"], edge_threads, settings.edge_slowdown) as served:
            with ways(bundle, served, threads) as every:
                answers = ask(every, images, f"evaluate {device}")
            at_points = [answers["split"]] if bundle.kind == "split" else []
            for point in range(1, len(bundle.points) if at_points else 0):
                with ways(bundle, served, threads, point=point) as every:
                    at_points += ask({"split": every["split"]}, images, f"evaluate {device}, point {point}").values()
            with ways(bundle, served, threads, link, settings.slowdown) as every:
                ask(every, timed[np.arange(warmup) % len(timed)])
                times = ask(every, timed, f"time {device}")
    except KeyboardInterrupt:
        raise Interrupted(f"evaluate {device} was interrupted; nothing is kept, `dvc repro` starts it over.") from None

    metrics = _metrics(bundle, search, settings, answers, labels)
    if len(at_points) > 1:
        metrics["split"]["points"] = [
            {"channels": tables.channels, "bits": tables.bits, "accuracy": _top1(rows, labels), **_coded(rows)}
            for tables, rows in zip(bundle.points, at_points, strict=True)
        ]
    metrics["accuracy_reference"] = _accuracy(paths.reference_onnx, edge_threads, bundle, images, labels)
    timing = {
        "bundle_id": bundle.manifest["bundle_id"],
        "images": len(timed),
        "warmup_images": warmup,
        "threads": threads,
        "edge_threads": edge_threads,
        "machine": describe_machine(),
        **{key: metrics[key] for key in ("link", "slowdown", "edge_slowdown")},
        "latency_ms": {mode: _spreads(rows) for mode, rows in times.items()},
        "raw": {mode: {part: [round(row.parts[part], 4) for row in rows] for part in PARTS} for mode, rows in times.items()},
    }
    timing["predicted_over_measured"] = {mode: metrics[mode]["predicted_ms"]["total_ms"] / timing["latency_ms"][mode]["total_ms"]["median"] for mode in times}
    atomic_write_json(paths.metrics, metrics)
    rates = np.geomspace(link.rate_mbps / 100, link.rate_mbps * 100, 41)
    totals = {mode: [_predicted(metrics[mode], Link(rate, link.rtt_ms))["total_ms"] for rate in rates] for mode in answers}
    with atomic_directory(paths.plots) as folder:
        write_csv(folder / "latency_vs_rate.csv", ["rate_mbps", "chosen", *totals], zip(rates, totals[metrics["chosen"]], *totals.values(), strict=True))
        write_csv(folder / "latency_parts.csv", ["mode", *PARTS], ([mode, *(metrics[mode]["predicted_ms"][part] for part in PARTS)] for mode in answers))
        chosen = [bundle.classes[int(answer.logits.argmax())] for answer in answers[metrics["chosen"]]]
        write_csv(folder / "confusion.csv", ["actual", "predicted"], zip([bundle.classes[label] for label in labels], chosen, strict=True))
    atomic_write_json(paths.timing, timing)
    _track(tracker, device, metrics, timing)
    figure = latency_against_rate(list(rates), totals, link.rate_mbps, f"{device}, predicted: {metrics['label']}")
    tracker.log_figure(figure, "latency_vs_rate.png")
    for path in (paths.metrics, paths.timing, *sorted(paths.plots.iterdir())):
        tracker.log_file(path)
    return metrics


def _accuracy(network: Path, threads: int, bundle: Bundle, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Top-1 share of `images` uint8 (N, 3, S, S) that the ONNX file `network` gets right, many at a time."""
    session, right = open_session(network, threads), 0
    for start in range(0, len(images), BATCH):
        logits = session.run(None, {session.get_inputs()[0].name: bundle.preprocessing.tensor(images[start : start + BATCH])})[0]
        right += int((logits.argmax(1) == labels[start : start + BATCH]).sum())
    return right / len(labels)


def _metrics(bundle: Bundle, search: Mapping[str, Any], settings: Device, answers: Mapping[str, list[Answer]], labels: NDArray[np.int64]) -> dict[str, Any]:
    candidate, link = Candidate.from_dict(bundle.manifest["candidate"]), Link(settings.link.rate_mbps, settings.link.rtt_ms)
    chosen = candidate.kind.replace("-", "_")
    metrics: dict[str, Any] = {
        "candidate": candidate.to_dict(),
        "label": candidate.label(),
        "chosen": chosen,
        "bundle_id": bundle.manifest["bundle_id"],
        "images": len(labels),
        "link": settings.link.model_dump(),
        "slowdown": settings.slowdown,
        "edge_slowdown": settings.edge_slowdown,
        **{key: search["chosen"]["measurement"][key] for key in ("device_macs", "device_params")},
    }
    for mode, rows in answers.items():
        found = search["chosen" if mode == chosen else mode]
        metrics[mode] = {
            "label": f"edge-only, {Candidate.from_dict(found['candidate']).label()}" if mode == "edge_only" else mode.replace("_", "-"),
            "accuracy": _top1(rows, labels),
            "predicted_ms": {part: found["measurement"][part] for part in PARTS},
        }
        if mode != "device_only":
            metrics[mode] |= _coded(rows)
            metrics[mode] |= {"wire_bytes": _sizes([wire_bytes(row.frame_bytes) for row in rows]), "reply_bytes": reply_frame_bytes(len(bundle.classes))}
        metrics[mode]["predicted_ms"] = _predicted(metrics[mode], link)
    return metrics


def _predicted(mode: Mapping[str, Any], link: Link) -> dict[str, float]:
    """The parts that search predicted, with the link's recomputed from the bytes that really crossed."""
    parts = dict(mode["predicted_ms"])
    parts["link_ms"] = link_ms(mode["frame_bytes"]["mean"], mode["reply_bytes"], link) if "frame_bytes" in mode else 0.0
    return parts | {"total_ms": sum(parts[part] for part in PARTS[:-1])}


def _top1(rows: list[Answer], labels: NDArray[np.int64]) -> float:
    return float(np.mean([int(row.logits.argmax()) == label for row, label in zip(rows, labels, strict=True)]))


def _coded(rows: list[Answer]) -> dict[str, dict[str, float]]:
    frames = [row.frame_bytes for row in rows]
    return {"payload_bits": _sizes([8 * (n - OVERHEAD_BYTES) for n in frames]), "frame_bytes": _sizes(frames)}


def _sizes(values: list[int]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "p95": float(np.percentile(values, 95))}


def _spreads(rows: list[Answer]) -> dict[str, dict[str, float]]:
    """Median and quartiles of every part, in ms."""
    values = {part: np.percentile([row.parts[part] for row in rows], (50, 25, 75)) for part in PARTS}
    return {part: dict(zip(("median", "low", "high"), map(float, value), strict=True)) for part, value in values.items()}


def _track(tracker: Tracker, device: str, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    tracker.log_params({"coder": timing["machine"]["coder"]})
    numbers: dict[str, float] = {"accuracy_reference": metrics["accuracy_reference"]}
    for mode, measured in timing["latency_ms"].items():
        numbers[f"accuracy_{mode}"] = metrics[mode]["accuracy"]
        for size in {"payload_bits", "frame_bytes", "wire_bytes"} & metrics[mode].keys():
            numbers |= {f"{size}_{key}_{mode}": value for key, value in metrics[mode][size].items()}
        numbers |= {f"measured_{part}_{mode}": spread["median"] for part, spread in measured.items()}
        numbers |= {f"predicted_{part}_{mode}": ms for part, ms in metrics[mode]["predicted_ms"].items()}
        numbers[f"predicted_over_measured_{mode}"] = timing["predicted_over_measured"][mode]
    tracker.log_metrics(numbers)
    link = f"{metrics['link']['rate_mbps']:g} Mbit/s, {metrics['link']['rtt_ms']:g} ms round trip, device slowed {metrics['slowdown']:g}x"
    medians = {mode: {part: spread["median"] for part, spread in measured.items()} for mode, measured in timing["latency_ms"].items()}
    tracker.log_figure(latency_breakdown(medians, f"{device}, measured: {link}"), "latency_measured.png")
    tracker.log_figure(latency_breakdown({mode: metrics[mode]["predicted_ms"] for mode in medians}, f"{device}, predicted: {link}"), "latency_predicted.png")
