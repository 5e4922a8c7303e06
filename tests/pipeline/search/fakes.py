"""A small search space and an evaluator with a known answer, for tests of the searcher alone."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.limits import Limits
from pipeline.search.optuna import Space, search
from pipeline.search.pareto import trials_csv

LIMITS = Limits(floor=0.7, memory_mb=5)
SPACE = Space(
    codes={"early": ((2, 4), (1, 2, 4)), "late": ((2, 4, 8), (1, 2))},
    bits=(1, 2, 4),
    qualities=(100, 50),
    keep=lambda cut: {"early": {}, "late": {"block1": (0.5, 1.0)}, "output": {"block1": (0.5, 1.0), "block2": (0.5, 1.0)}}[cut],
)


def measurement(accuracy: float, total_ms: float, wire_bytes: float, memory_mb: float = 1.0) -> Measurement:
    parts = {"device_ms": total_ms, "encode_ms": 0.0, "link_ms": 0.0, "decode_ms": 0.0, "edge_ms": 0.0}
    sizes = {"payload_bits": 8 * wire_bytes, "frame_bytes": wire_bytes, "wire_bytes": wire_bytes}
    return Measurement(
        accuracy=accuracy,
        total_ms=total_ms,
        energy_mj=total_ms,
        device_macs=1,
        device_params=1,
        device_memory_mb=memory_mb,
        bundle_mb=2 * memory_mb,
        **parts,
        **sizes,
    )


def fake_measure(candidate: Candidate, trial_seed: int) -> Measurement:
    """Pure in its arguments; more bits and channels are more accurate and dearer, pruning is cheaper and less accurate."""
    noise = trial_seed % 1000 / 1e5
    pruned = sum(1 - ratio for _, ratio in candidate.keep)
    if candidate.kind == "device-only":
        return measurement(0.9 - 0.1 * pruned - noise, 100 - 20 * pruned, 0.0)
    if candidate.quality is not None:
        return measurement(0.5 + candidate.quality / 250, 20 + candidate.quality, 10.0 * candidate.quality)
    assert candidate.bits
    assert candidate.code_channels
    assert candidate.stride
    size = candidate.bits * candidate.code_channels / candidate.stride
    if size == 32:
        raise RuntimeError("the fake\nruns out of luck")
    return measurement(math.nan if size == 16 else 0.9 - 0.2 / (1 + size) - noise, 30 + size - 5 * pruned, 4 * size)


def run(folder: Path, **changes: Any) -> str:
    """Search to the end and give the table."""
    options = {"seed": 3, "trials": 20, "sampler": "tpe", "journal": folder / "study" / "journal.log"} | changes
    measure = options.pop("measure", fake_measure)
    return trials_csv(list(search(SPACE, measure, LIMITS, **options)), LIMITS)


if __name__ == "__main__":  # searches slowly, to be killed

    def slow(candidate: Candidate, trial_seed: int) -> Measurement:
        time.sleep(0.05)
        return fake_measure(candidate, trial_seed)

    print(os.getpid(), flush=True)
    run(Path(sys.argv[1]), measure=slow, **json.loads(sys.argv[2]))
