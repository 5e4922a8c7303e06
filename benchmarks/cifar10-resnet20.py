"""The figures of the CIFAR-10 (JPEG) run in examples/cifar10, after `make cifar10 DATA=...`, which takes an hour and so is not run again here.

`--busy` if the machine had something else to do meanwhile: how long the stages took is then left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pipeline_figures import collect, noop_repro
from benchmarks.results_file import ROOT, figure, write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", action="store_true", help="the machine had something else to do while the pipeline ran")
    busy = parser.parse_args().busy
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{ROOT / 'mlflow.db'}")
    os.chdir(ROOT / "examples/cifar10")
    figures, raw, dataset, seeds = collect("camera", None, noop_repro())
    if busy:
        figures = {name: value for name, value in figures.items() if not name.startswith("stage_s.")}
        figures["repro_s"] = figure(None, "s", "the machine had something else to do meanwhile")
    print(write("cifar10-resnet20", dataset=dataset | {"name": "CIFAR-10 (JPEG)"}, seeds=seeds, figures=figures, raw=raw))
