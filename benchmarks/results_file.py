"""Writes results/NAME.json in the one form all benchmarks share (figures with unit, count, spread and how; machine, commit, data, raw samples)."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.files import atomic_write_text
from pipeline.machine import describe_machine
from pipeline.tracking import stage_run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def figure(value: float | None, unit: str, how: str, *, n: int = 1, spread: tuple[float, float] | None = None) -> dict[str, Any]:
    """One number with what it takes to read it; None where it could not be had, with the reason in `how`."""
    return {"value": value, "unit": unit, "n": n, "spread": list(spread) if spread else None, "how": how}


def write(name: str, *, dataset: dict[str, str], seeds: list[int], figures: dict[str, Any], raw: dict[str, Any]) -> Path:
    """Write results/`name`.json whole and return its path."""
    machine = describe_machine()
    machine["versions"] |= {package: version(package) for package in ("torch", "torchvision", "lightning", "optuna", "dvc", "mlflow")}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    path = RESULTS / f"{name}.json"
    found = {
        "name": name,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "dataset": dataset,
        "seeds": seeds,
        "figures": figures,
        "raw": raw,
    }
    atomic_write_text(path, compact(json.dumps(found, indent=1, sort_keys=True, allow_nan=False)) + "\n")
    return path


def compact(text: str) -> str:
    """Indented JSON with each list of nothing but numbers on one line: raw samples are most of a results file."""
    number = r"(?:-?\d[\d.eE+-]*|null)"
    return re.sub(rf"\[\s+({number}(?:,\s+{number})*)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def track(name: str) -> None:
    """Log the figures of results/`name`.json, and the pictures beside it, as a run in MLflow; its `params_hash` is that file's."""
    path = RESULTS / f"{name}.json"
    with stage_run(f"benchmark {name}", None, path) as tracker:
        found = json.loads(path.read_text())["figures"]
        tracker.log_metrics({key: row["value"] for key, row in found.items() if row["value"] is not None})
        for picture in sorted(RESULTS.glob(f"{name}*.png")):
            tracker.log_file(picture)
