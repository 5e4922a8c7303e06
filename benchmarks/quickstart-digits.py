"""What `make repro` does for a new user: the default pipeline in a fresh clone with an empty cache, and a second run with nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pipeline_figures import collect, timed
from benchmarks.results_file import ROOT, write

if __name__ == "__main__":
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="coinfer-bench-") as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        os.chdir(folder)
        subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], check=True)
        repro_s = timed("dvc", "repro")
        noop_repro_s = timed("sh", "-c", f"dvc repro && {sys.executable} -m pipeline.cli report")
        figures, raw, dataset, seeds = collect("camera", repro_s, noop_repro_s)
        print(write("quickstart-digits", dataset=dataset | {"name": "scikit-learn digits"}, seeds=seeds, figures=figures, raw=raw))
