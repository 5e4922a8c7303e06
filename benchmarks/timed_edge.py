"""`coinfer edge` under a stopwatch: FILE gets the milliseconds of every call of ONNX Runtime, in their order, once the edge has ended.

`python benchmarks/timed_edge.py FILE OPTIONS`, where OPTIONS are those of `coinfer edge`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxruntime as ort

from pipeline.files import atomic_write_json


def time_onnx() -> list[float]:
    """Milliseconds of every call of ONNX Runtime that this process makes from now on, which are added as they end."""
    found: list[float] = []
    run = ort.InferenceSession.run

    def timed(*arguments: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return run(*arguments)
        finally:
            found.append(1e3 * (time.perf_counter() - begin_s))

    ort.InferenceSession.run = timed
    return found


if __name__ == "__main__":
    from pipeline.cli import main

    path = Path(sys.argv[1])
    times_ms = time_onnx()
    sys.argv[:] = ["coinfer", "edge", *sys.argv[2:]]
    try:
        main()
    finally:
        atomic_write_json(path, times_ms)
