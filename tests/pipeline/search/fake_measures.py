"""Evaluators with a known answer, light enough for a worker to start at once."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from pipeline.errors import CoinferError
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.executor import Measure


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


def fake_measure(candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement:
    """Pure in its arguments; more bits and channels are more accurate and dearer, pruning is cheaper and less accurate, what is rescored worse than thought."""
    noise = trial_seed % 1000 / 1e5 + 0.02 * rescores
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


def plain() -> Measure:
    return fake_measure


def slow(seconds: float, log: str | None = None) -> Measure:
    """A line in `log` for every evaluation that starts: the process, then the candidate."""

    def measure(candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement:
        if log is not None:
            with Path(log).open("a") as file:
                file.write(f"{os.getpid()} {trial_seed} {candidate.to_json()}\n")
        time.sleep(seconds)
        return fake_measure(candidate, trial_seed, rescores=rescores)

    return measure


def deadly(cut: str, log: str | None = None) -> Measure:
    """Candidates at `cut` take the worker with them."""

    def measure(candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement:
        if candidate.cut == cut:
            os.kill(os.getpid(), 9)
        return slow(0.0, log)(candidate, trial_seed, rescores=rescores)

    return measure


def unable(sentence: str) -> Measure:
    raise CoinferError(sentence)


def stillborn() -> Measure:
    os._exit(3)
