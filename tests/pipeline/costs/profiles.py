"""A profile made by hand, with round numbers that predictions can be checked against."""

from pipeline.costs.device_profile import BackboneProfile, Block, CoderTimes, DeviceProfile, Point, Spread

KEY = "toy@3x16x16"


def exactly(ms: float) -> Spread:
    return Spread(ms, ms, ms)


def point(macs: int, ms: float) -> Point:
    return Point(macs, ms, ms, ms)


def toy_profile() -> DeviceProfile:
    """Three blocks of 1, 2 and 1 ms (half that at half the MACs); measured at once they take 3 ms and a call costs 0.5 ms."""
    backbone = BackboneProfile(
        call_overhead=exactly(0.5),
        blocks=(
            Block("stem", (8, 16, 16), (point(500, 0.5), point(1000, 1.0))),
            Block("body", (16, 8, 8), (point(1000, 1.0), point(2000, 2.0))),
            Block("output", (10,), (point(100, 0.8), point(160, 1.0))),
        ),
        full=point(3160, 3.5),
        encoder={"8x16x16": (point(100, 0.1), point(300, 0.3)), "16x8x8": (point(100, 0.2),)},
        decoder={"8x16x16": (point(100, 0.4), point(300, 0.6)), "16x8x8": (point(100, 0.2),)},
        preprocess=exactly(0.25),
        webp_encode={30: exactly(1.0), 90: exactly(1.6), 100: exactly(4.0)},
        webp_decode=exactly(0.7),
    )
    coder = CoderTimes("c", encode_fixed_ms=0.01, encode_per_symbol_ms=0.001, decode_fixed_ms=0.02, decode_per_symbol_ms=0.002)
    return DeviceProfile("toy", "onnxruntime 1", 1, {"cpu": "toy", "os": "Linux", "arch": "x86_64"}, coder, {KEY: backbone})
