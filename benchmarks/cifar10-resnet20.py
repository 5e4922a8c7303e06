"""The figures of the CIFAR-10 (JPEG) run in examples/cifar10, after `make cifar10 DATA=...`; a stage takes hours, so it is not run again here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pipeline_figures import collect, noop_repro
from benchmarks.results_file import ROOT, write

if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{ROOT / 'mlflow.db'}")
    os.chdir(ROOT / "examples/cifar10")
    figures, raw, dataset, seeds = collect("camera", None, noop_repro())
    print(write("cifar10-resnet20", dataset=dataset | {"name": "CIFAR-10 (JPEG)"}, seeds=seeds, figures=figures, raw=raw))
