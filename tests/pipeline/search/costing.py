"""A space of two cuts and a costing of it whose latency is as unruly as real ones, for tests of environment and agent."""

from __future__ import annotations

import hashlib

from pipeline.search.candidate import INPUT, Candidate, Measurement
from pipeline.search.layer import Layer
from pipeline.search.space import Space

GROUPS = {"early": ["a", "b"], "late": ["a", "b", "c", "d"], "output": ["a", "b", "c", "d", "e"]}
RATIOS = (0.25, 0.5, 0.75, 1.0)
SPACE = Space(
    codes={"early": ((2, 4, 8), (1, 2, 4)), "late": ((2, 4, 8, 16), (1, 2))},
    bits=(1, 2, 4, 8),
    images=(("webp", 100),),
    keep=lambda cut: dict.fromkeys(GROUPS[cut], RATIOS),
)


class NastyCosting:
    """Halves grow dearer with their widths but for a jolt of up to `jolt` ms, another for every candidate, that has no order at all."""

    def __init__(self, jolt: float = 0.0) -> None:
        self.jolt = jolt

    def layers(self, cut: str) -> list[Layer]:
        return [Layer(name, "fc" if name == "e" else "conv", 8, 8 + n, 1, 3, 100 * n, 1000 * (n + 1)) for n, name in enumerate(GROUPS[cut])]

    def feature_shape(self, cut: str) -> tuple[int, ...]:
        return {"early": (8, 16, 16), "late": (16, 8, 8), "output": (10,)}[cut]

    def bound_ms(self, candidate: Candidate) -> float:
        kept = dict(candidate.keep)
        half = sum((n + 1) * kept.get(name, 1.0) for n, name in enumerate(GROUPS[candidate.cut]))
        sent = 0.0
        if candidate.kind == "split":
            assert candidate.code_channels
            assert candidate.stride
            assert candidate.bits
            sent = 1 + candidate.code_channels / candidate.stride**2 * candidate.bits / 8
        word = hashlib.sha256(candidate.to_json().encode()).digest()
        return half + sent + self.jolt * word[0] / 255


def measurement(candidate: Candidate, costing: NastyCosting) -> Measurement:
    """The less is pruned and coded away, the more accurate."""
    pruned = sum(1 - ratio for _, ratio in candidate.keep) / 10
    coded = 0.2 / (candidate.bits * candidate.code_channels / candidate.stride) if candidate.bits and candidate.code_channels and candidate.stride else 0.0
    total_ms = 20.0 if candidate.cut == INPUT else costing.bound_ms(candidate)
    parts = dict.fromkeys(("device_ms", "encode_ms", "link_ms", "decode_ms", "edge_ms", "payload_bits", "frame_bytes", "wire_bytes", "energy_mj"), 0.0)
    return Measurement(accuracy=0.95 - pruned - coded, total_ms=total_ms, device_macs=1, device_params=1, device_memory_mb=1.0, bundle_mb=1.0, **parts)
