"""What the runtime costs and withstands: two halves on two cores of one machine, over real sockets -> results/runtime.json.

Parts are run one at a time or all, see `benchmarks/parts.py`; nothing else should run beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import runtime_coder, runtime_fuzz, runtime_overhead, runtime_predicted, runtime_soak, runtime_start, runtime_throughput
from benchmarks.parts import Part, run

NAME = "runtime"
SEED = 0
FUZZ_INPUTS = 1_300_000  # of which a million for frame, TCP stream and loader
ASKED_FOR = (  # by the issue; what is not run yet has no value
    *(f"{name}.{transport}" for name in ("overhead_ms", "floor_ms", "wire_bytes_per_image") for transport in ("tcp", "grpc")),
    *(f"coder_ms_4096.{coder}" for coder in ("c", "python", "zlib", "zstd")),
    *("frame_overhead_bytes", "throughput_ratio", "throughput_ratio_resnet20", "p99_ms_half_load", "predicted_error_median"),
    *(f"soak_{name}" for name in ("requests", "lost", "doubled", "split_share", "recovery_s_max", "memory_growth")),
    *("fuzz_inputs", "fuzz_failures", "device_rss_mb", "first_prediction_s"),
)
PARTS = {
    "overhead": Part(runtime_overhead.measure, runtime_overhead.figures),
    "coder": Part(runtime_coder.measure, runtime_coder.figures),
    "start": Part(runtime_start.measure, runtime_start.figures),
    "throughput": Part(runtime_throughput.measure, runtime_throughput.figures),
    "predicted": Part(runtime_predicted.measure, runtime_predicted.figures),
    "soak": Part(runtime_soak.measure, runtime_soak.figures),
    "fuzz": Part(lambda: runtime_fuzz.measure(FUZZ_INPUTS, SEED), runtime_fuzz.figures),
}

if __name__ == "__main__":
    run(NAME, PARTS, ASKED_FOR, dataset="random pictures, and CIFAR-10 as JPEG", seeds=[SEED], description=__doc__)
