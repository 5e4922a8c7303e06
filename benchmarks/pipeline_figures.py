"""The figures of one finished pipeline run, read from what it left: metrics, timing, parity and MLflow."""

from __future__ import annotations

import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from typing import Any

import mlflow

from benchmarks.results_file import ROOT, figure
from pipeline.data import load_card
from pipeline.files import read_json
from pipeline.params import load_params
from pipeline.paths import BACKBONE_METRICS, DATA_CARD, PARAMS, DevicePaths
from pipeline.report import measured_times
from pipeline.tracking import EXPERIMENT, provenance, tracking_uri

STAGES = ("prepare", "pretrain", "profile", "search", "finetune", "export", "evaluate")


def timed(*command: str) -> float:
    """Seconds that `command` takes; its output goes where ours goes."""
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


@contextmanager
def fresh_clone() -> Iterator[None]:
    """The current directory is a new clone of what is committed here, with the C coder built and with nothing cached."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="coinfer-bench-") as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], check=True, cwd=folder)
        with chdir(folder):
            yield


def noop_repro() -> float:
    """Seconds of a `dvc repro` that has nothing to do, and of the report."""
    return timed("sh", "-c", f"dvc repro && {sys.executable} -m pipeline.cli report")


def stage_seconds() -> tuple[dict[str, float], list[str]]:
    """Stage -> seconds of its latest finished MLflow run of this working copy; and the stages whose run before was not finished."""
    client = mlflow.MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found: dict[str, float] = {}
    resumed = []
    for stage in STAGES:
        wanted = f"tags.stage = '{stage}' and tags.project = '{provenance(stage, None, PARAMS)['project']}'"
        runs = client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time DESC"])
        runs = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        finished = [number for number, run in enumerate(runs) if run.info.status == "FINISHED"]
        if finished:
            latest = runs[finished[0]]
            found[stage] = (latest.info.end_time - latest.info.start_time) / 1e3
            if _kept_epochs(client, latest) or any(run.info.status != "FINISHED" for run in runs[finished[0] + 1 :][:1]):
                resumed.append(stage)
    return found, resumed


def _kept_epochs(client: mlflow.MlflowClient, run: Any) -> bool:
    """Whether the run began with epochs that an earlier one, maybe of another working copy, had trained: they are logged at once."""
    for key in (key for key in run.data.metrics if key.endswith("loss")):
        times = [run.info.start_time, *sorted(row.timestamp for row in client.get_metric_history(run.info.run_id, key))]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        if len(gaps) > 2 and min(gaps) < 0.2 * statistics.median(gaps):
            return True
    return False


def collect(device: str, repro_s: float | None, noop_repro_s: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, str], list[int]]:
    """(figures, raw, dataset, seeds) of the run in the current directory."""
    params, paths = load_params(), DevicePaths(device)
    metrics, parity = (read_json(path, "an out of the pipeline") for path in (paths.metrics, paths.parity))
    timing = measured_times(paths, metrics)
    assert timing is not None, f"{paths.timing} is missing or of another run; force the stage evaluate"
    tuned, chosen = read_json(paths.finetune_metrics, "the fine-tuning"), read_json(paths.chosen, "the chosen candidate")
    link, n = metrics["link"], metrics["images"]
    where = f"{link['rate_mbps']:g} Mbit/s, {link['rtt_ms']:g} ms round trip, device slowed {metrics['slowdown']:g}x, edge {metrics['edge_slowdown']:g}x"
    split = metrics.get("split")
    seconds, resumed = stage_seconds()
    figures = {
        "accuracy_reference": figure(
            metrics["accuracy_reference"],
            "share",
            "top-1 on the test images of the unsplit backbone, the better on validation of pretrained and given the split's extra epochs",
            n=n,
        ),
        "accuracy_split": figure(split and split["accuracy"], "share", "top-1 on the test images through both ONNX halves in two processes", n=n),
        "accuracy_edge_only": figure(metrics["edge_only"]["accuracy"], "share", metrics["edge_only"]["label"], n=n),
        "payload_bits_mean": figure(split and split["payload_bits"]["mean"], "bit", "coded symbols of a test image, after the coder's flush", n=n),
        "frame_bytes_mean": figure(split and split["frame_bytes"]["mean"], "byte", "payload with our header and checksum", n=n),
        "frame_bytes_p95": figure(split and split["frame_bytes"]["p95"], "byte", "the same, 95th percentile", n=n),
        "wire_bytes_mean": figure(split and split["wire_bytes"]["mean"], "byte", "the same with TCP/IP headers", n=n),
        "webp_wire_bytes_mean": figure(metrics["edge_only"]["wire_bytes"]["mean"], "byte", metrics["edge_only"]["label"], n=n),
        "parity_top1": figure(
            (parity.get("split") or parity.get("device_only") or parity["reference"])["top1_equal"],
            "share",
            "validation images with equal top-1 in torch and through the ONNX chain",
            n=parity["images"],
        ),
    }
    for way, parts in timing["latency_ms"].items():
        total = parts["total_ms"]
        figures[f"latency_ms.{way}"] = figure(
            total["median"],
            "ms",
            f"median and quartiles, two processes over loopback, a slowed half rehearsed before it is timed: {where}",
            n=timing["images"],
            spread=(total["low"], total["high"]),
        )
        figures[f"predicted_over_measured.{way}"] = figure(
            timing["predicted_over_measured"][way], "ratio", "predicted total over the measured median", n=timing["images"]
        )
    figures["predicted_over_measured"] = figures.get("predicted_over_measured.split", figures["predicted_over_measured.device_only"])
    untimed = [stage for stage in STAGES if stage not in seconds]
    if repro_s is not None:
        figures["repro_s"] = figure(repro_s, "s", "`dvc repro`, nothing cached")
    elif untimed:
        figures["repro_s"] = figure(None, "s", f"no MLflow run of this folder says how long {', '.join(untimed)} took")
    elif resumed:
        figures["repro_s"] = figure(None, "s", f"{', '.join(resumed)} had been interrupted before, from where the last run may have gone on")
    else:
        figures["repro_s"] = figure(sum(seconds.values()), "s", "sum of the stages")
    figures["noop_repro_s"] = figure(noop_repro_s, "s", "`make repro` (or its like) with nothing to do")
    figures |= {f"stage_s.{stage}": figure(value, "s", "length of the stage's (last) MLflow run, without process start") for stage, value in seconds.items()}
    with paths.trials.open(newline="") as file:
        trials = list(csv.DictReader(file))
    with (paths.plots / "latency_vs_rate.csv").open(newline="") as file:
        rates = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    raw = {
        "candidate": metrics["candidate"],
        "label": metrics["label"],
        "metrics": metrics,
        "finetune": tuned,
        "pretrain": read_json(BACKBONE_METRICS, "the pretraining"),
        "parity": parity,
        "search": {key: chosen[key] for key in ("chosen", "device_only", "edge_only", "reference_accuracy", "floor")},
        "trials": trials,
        "latency_vs_rate": rates,
        "profiled_on": read_json(paths.device_profile, "the device profile")["machine"]["cpu"],
        "timing": {key: timing[key] for key in ("latency_ms", "raw", "images", "warmup_images", "threads")},
        "params": params.model_dump(),
    }
    card = read_json(DATA_CARD, "the data card")
    return figures, raw, {"source": params.data.source, "hash": load_card().sha256, "counts": str(card["counts"])}, [params.run.seed]
