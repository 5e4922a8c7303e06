"""What a run of the edge server was like, told a `Tracker`."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from pipeline.errors import CoinferError
from pipeline.files import atomic_write_json
from pipeline.plots import histograms
from pipeline.runtime.tally import Served, Tally
from pipeline.tracking import Tracker, little_patience, new_run

QUANTILES = {"p50": 0.5, "p99": 0.99}


def log_or_keep(tally: Tally) -> None:
    """`log_serving` as a new run of MLflow; where that fails, or is interrupted, the summary goes to a file in the current folder,
    and if that cannot be written to standard output.

    Raises:
        CoinferError: it failed; says where the summary is.
    """
    try:
        with little_patience(), new_run("serve", {"stage": "serve"}) as tracker:
            log_serving(tally, tracker)
    except (CoinferError, KeyboardInterrupt) as error:
        summary, path = tally.summary(), Path(f"coinfer-edge-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.json")
        try:
            atomic_write_json(path, summary)
            where = f"kept in {path.resolve()}"
        except CoinferError:  # a service may have nowhere to write
            print(json.dumps(summary), flush=True)
            where = "on standard output, as no file can be written here"
        raise CoinferError(f"what was served could not be logged and is {where}: {str(error) or 'it was interrupted.'}") from error


def log_serving(tally: Tally, tracker: Tracker) -> None:
    """Totals of the run, all counts as summary.json, and within the run one for each bundle that was served, tagged `bundle_id`.

    Quantiles are those of histograms, so between two of their bounds they are guessed.
    """
    summary = tally.summary()
    totals = {f"refused.{reason}": count for reason, count in summary["refusals"].items()}
    totals |= {f"bytes_{direction}": count for direction, count in summary["bytes"].items()}
    totals |= {"seconds": summary["seconds"], "devices": len(summary["devices"]), "answered": sum(served.answered for served in tally.served.values())}
    if summary["fallback_share"] is not None:
        totals["fallback_share"] = summary["fallback_share"]
    tracker.log_metrics(totals)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "summary.json"
        atomic_write_json(path, summary)
        tracker.log_file(path)
    for bundle_id, served in tally.served.items():
        with tracker.child(f"serve {bundle_id.hex()}", bundle_id=bundle_id.hex()) as child:
            _log_bundle(bundle_id.hex(), served, child)


def _log_bundle(name: str, served: Served, tracker: Tracker) -> None:
    metrics = {"answered": float(served.answered), "batch_frames.mean": served.batches.mean, "confidence.mean": served.confidence.mean}
    for part, histogram in served.parts.items():
        metrics |= {f"{part}.mean": histogram.mean} | {f"{part}.{label}": histogram.quantile(share) for label, share in QUANTILES.items()}
    tracker.log_metrics(metrics)
    parts = {part.removesuffix("_ms"): (histogram.bounds, histogram.counts) for part, histogram in served.parts.items()}
    tracker.log_figure(histograms(parts, "up to ... ms", f"bundle {name}: {served.answered} frames, ms by part"), "ms_by_part")
    confidence = {"largest probability": (served.confidence.bounds, served.confidence.counts)}
    tracker.log_figure(histograms(confidence, "up to", f"bundle {name}: {served.answered} answers"), "confidence")
