"""What `make repro` does for a new user: the default pipeline in a fresh clone with an empty cache, and a second run with nothing to do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pipeline_figures import collect, fresh_clone, noop_repro, timed
from benchmarks.results_file import write

if __name__ == "__main__":
    with fresh_clone():
        figures, raw, dataset, seeds = collect("camera", timed("dvc", "repro"), noop_repro())
        print(write("quickstart-digits", dataset=dataset | {"name": "scikit-learn digits"}, seeds=seeds, figures=figures, raw=raw))
