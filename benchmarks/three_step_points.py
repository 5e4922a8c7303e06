"""What results/three_step.json trains and measures: chains of points, the dearest first; most start from one code, some from the point before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.image_points import FORMATS, QUALITIES, ImagePoint
from benchmarks.pruned_points import PrunedPoint
from benchmarks.split_points import Point, reference_weights
from benchmarks.three_step_training import WEIGHTS
from models.codec import CodecSpec
from pipeline.runtime.images import Format

CUTS = {
    "resnet20": {"first": "layer1.2", "middle": "layer2.2", "last": "layer3.2"},
    "resnet56": {"first": "layer1.8", "middle": "layer2.8", "last": "layer3.8"},
}
VECTOR = "flatten"  # of ResNet-20
# of the network without codec, whose first part is what codecs at the last cut start from: behind the frozen head, then all
UNCODED = ((2, 15), (0, 3), (0, 3), (0, 3))
EPOCHS = {"first": (2, 9), "middle": (2, 9), "last": (12, 0)}  # of a codec
RATE_EPOCHS = EPOCHS | {"first": (0, 9), "middle": (0, 9)}  # of one that takes all its weights over from the fine code
FINISHED = (0, 2)  # of points that go on from those behind a frozen head
FINE_EPOCHS = {"first": (3, 15), "middle": (4, 15)}
FINE = {"first": CodecSpec("uniform", 16, 4, 4), "middle": CodecSpec("uniform", 32, 4, 4)}  # trained with the network; other codecs there go on from it
LARGE = ((4, 3), (0, 6))  # of ResNet-56: behind the frozen head, then all, twice
DROPPED = {"first": 0.55, "middle": 0.55, "last": 0.51}  # share of its head's MACs that go at least, so that with the encoder half are left
PRUNING, PRUNED = 2, {"first": 3, "middle": 6, "last": 6}  # epochs in which they go, and after
FURTHER = (0, 3)  # of a split that goes on from another with the next rate weight
DROPPED_SMALL, PRUNING_SMALL = 0.3, 1  # the same of ResNet-20
WHOLE_EPOCHS, TWO_STEP_EPOCHS = 9, 3  # of each step in which a network without a codec is pruned, to stay on the device and to be cut
IMAGES = (9, 3)  # epochs of the first image quality and of each after it, on from the reference
QUALITIES_TRAINED = (70, 65, 60, 50, 40)
UNIFORM = {
    "first": ((16, 4, 4), (16, 4, 5), (16, 4, 3), (16, 4, 2)),
    "middle": ((32, 4, 4), (32, 4, 5), (32, 4, 3), (32, 4, 2)),
    "last": ((12, 4, 2), (8, 4, 2), (8, 4, 1)),
}
CODEBOOK = {"first": ((16, 4, 4),), "middle": ((32, 4, 4), (32, 4, 3)), "last": ((12, 4, 2), (8, 4, 1))}
RATE = {  # rate weights
    "first": (3e-4, 5e-4, 1.5e-4, 2.2e-4, 1e-4, 5e-5),
    "middle": (7e-4, 4e-4, 1.4e-3, 5e-4, 2e-4, 1e-4),
    "last": (1e-2, 4e-2, 8e-2, 1e-3),
}
FINISHED_RATE = 0.04, (0.08, 0.16)  # at the last cut: the one gone on from, and those that do
LAST_RATE = CodecSpec("rate", 16, 4, 3)
BOTTLENETPP = {  # (stride, widths)
    "first": ((4, (16, 8, 4)), (8, (16, 8))),
    "middle": ((4, (32, 16, 8)), (2, (16, 8, 4, 2))),
    "last": ((4, (8, 4, 2, 1)), (2, (2, 1))),
}
LARGE_RATE = {"first": (2e-4, 1.2e-4), "middle": (4e-4,), "last": (2e-2,)}  # the first of each is pruned too
# at cuts of ResNet-20 with the shortest device halves: timed, in no figure of bits
EARLY_RATE = {"layer1.0": (1e-4, 7e-5), "relu": (1.5e-4, 7e-5)}
SEEDS = (0, 1, 2)


def chains(seed: int = 0) -> Iterator[Sequence[Any]]:
    """What matters most comes first."""
    for chain in _chains():
        yield [_seeded(point, seed) for point in chain]


def every_point() -> Iterator[Any]:
    """Of all seeds; what knows of none comes with the first."""
    return (point for seed in SEEDS for chain in chains(seed) for point in chain if not seed or isinstance(point, Point))


def _seeded(point: Any, seed: int) -> Any:
    """`point` and those before it trained with `seed`, if it is one that knows of seeds."""
    if not isinstance(point, Point):
        return point
    return dataclasses.replace(point, seed=seed, before=_seeded(point.before, seed) if point.before else None)


def _chains() -> Iterator[Sequence[Any]]:
    for where in RATE:
        for point in _rates(where):
            yield [point]
    for cut, (weight, *further) in EARLY_RATE.items():
        point = Point("resnet20", WEIGHTS["resnet20"], cut, _rate("first", weight), *FINE_EPOCHS["first"])
        yield [point, *_chain(point, [_rate("first", weight) for weight in further], [FURTHER])]
    yield [_image(image_format, 100) for image_format in ("png", "webp")]
    for image_format in FORMATS:
        yield [_image(image_format, quality) for quality in QUALITIES]
    yield _images("webp")
    good, weights = FINISHED_RATE
    yield _chain(_rates("last")[RATE["last"].index(good)], [_rate("last", weight) for weight in weights], [FINISHED])
    for where in CUTS["resnet20"]:
        for stride, widths in BOTTLENETPP[where]:
            codecs = [CodecSpec("bottlenet++", width, stride, 8) for width in widths]
            yield _from_backbone(where, codecs) if where in FINE else _others(where, codecs)
    few = _others("last", [CodecSpec("bottlenet++", 4, 4, 8)])[0]
    yield _chain(few, [CodecSpec("bottlenet++", width, 4, 8) for width in (4, 2, 1)], [FINISHED])
    for where, codes in UNIFORM.items():
        yield _others(where, [CodecSpec("uniform", *code) for code in codes])
    yield _chain(_others("last", [CodecSpec("uniform", *UNIFORM["last"][-1])])[0], [CodecSpec("uniform", *size) for size in ((8, 4, 1), (4, 4, 1))], [FINISHED])
    for where in CUTS["resnet20"]:
        yield _others(where, [CodecSpec("codebook", *code) for code in CODEBOOK[where]])
    yield _others("last", [CodecSpec("jscc-awgn", width, 4, 8, noise=(0.0562, 1.0)) for width in (16, 8, 4)])
    yield _others("last", [CodecSpec("jscc-bec", 8, 4, 8, noise=(0.01, 0.4))])
    yield _others("last", [CodecSpec("jscc-bsc", 8, 4, 8, noise=(0.01, 0.2))])
    yield _others("middle", [CodecSpec("multi-rate", 16, 4, 8, points=((16, 4), (12, 3), (8, 2)))])
    yield _whole((0.9, 0.8, 0.7), WHOLE_EPOCHS)
    for pruned in _pruned_small():
        yield [pruned]
    for where, cut in CUTS["resnet56"].items():
        weight, *further = LARGE_RATE[where]
        point = _large(cut, _rate(where, weight))
        yield [point]
        yield [dataclasses.replace(point, frozen_epochs=0, epochs=PRUNED[where], before=point, share=DROPPED[where], prune_epochs=PRUNING)]
        yield _chain(point, [_rate(where, weight) for weight in further], [FURTHER])
    for image_format in ("jpeg", "jpeg-bare"):
        yield _images(image_format)
    yield [_vector()]
    yield from _two_step()
    for where in CUTS["resnet20"]:
        yield _others(where, [CodecSpec("public-code", 4, 1, 4)])
    yield _others("last", [CodecSpec("public-code-vector", 16, 1, 4)])


def _rates(where: str) -> list[Point]:
    return _each(where, [_rate(where, weight) for weight in RATE[where]], RATE_EPOCHS)


def _others(where: str, codecs: Sequence[CodecSpec]) -> list[Point]:
    return _each(where, codecs, EPOCHS)


def _from_backbone(where: str, codecs: Sequence[CodecSpec]) -> list[Point]:
    """As many epochs as the fine code and a `rate` after it, all of them with the same codec."""
    return [_chain(dataclasses.replace(_fine(where), codec=codec), [codec], [RATE_EPOCHS[where]])[0] for codec in codecs]


def _each(where: str, codecs: Sequence[CodecSpec], epochs: dict[str, tuple[int, int]]) -> list[Point]:
    """From the fine code; at the last cut, behind which little but the codec is left to train, from the network without codec."""
    root = _fine(where) if where in FINE else _uncoded()[0]
    return [_chain(root, [codec], [epochs[where]])[0] for codec in codecs]


def _fine(where: str) -> Point:
    return Point("resnet20", WEIGHTS["resnet20"], CUTS["resnet20"][where], FINE[where], *FINE_EPOCHS[where])


def _rate(where: str, weight: float) -> CodecSpec:
    return dataclasses.replace(FINE.get(where, LAST_RATE), kind="rate", rate_weight=weight)


def _large(cut: str, codec: CodecSpec) -> Point:
    first, *rest = LARGE
    root = Point("resnet56", WEIGHTS["resnet56"], cut, codec, *first)
    return _chain(root, [codec] * len(rest), rest)[-1]


def _vector() -> Point:
    """What pools to a vector on the device: classification there, so in a row of its own and in no figure."""
    spec = CodecSpec("rate", 16, 1, 4, rate_weight=RATE["last"][0])
    return Point("resnet20", str(reference_weights(uncoded("resnet20"))), VECTOR, spec, *EPOCHS["last"])


def _images(image_format: Format) -> list[ImagePoint]:
    points: list[ImagePoint] = []
    for quality in QUALITIES_TRAINED:
        points.append(_image(image_format, quality, IMAGES[bool(points)], points[-1] if points else None))
    return points


def _image(image_format: Format, quality: int, epochs: int = 0, before: ImagePoint | None = None) -> ImagePoint:
    return ImagePoint("resnet20", str(reference_weights(uncoded("resnet20"))), image_format, quality, epochs, before)


def _whole(shares: Sequence[float], epochs: int) -> list[PrunedPoint]:
    """The whole reference pruned, each from what the one before left; `shares` are of its channels."""
    points: list[PrunedPoint] = []
    weights = str(reference_weights(uncoded("resnet20")))
    for share, before in zip(shares, (1.0, *shares), strict=False):
        points.append(PrunedPoint("resnet20", weights, round(share / before, 3), epochs, before=points[-1] if points else None))
    return points


def _two_step() -> Iterator[list[PrunedPoint]]:
    """2-step pruning at each cut: all keep 0.8, then what crosses a half, then a half of that."""
    first = _whole((0.9, 0.8), TWO_STEP_EPOCHS)[-1]
    for cut in CUTS["resnet20"].values():
        half = PrunedPoint("resnet20", first.weights, 0.5, TWO_STEP_EPOCHS, cut, first)
        yield [half, PrunedPoint("resnet20", first.weights, 0.5, TWO_STEP_EPOCHS, cut, half)]


def _pruned_small() -> list[Point]:
    """ResNet-20's middle half without its least needed blocks, and pruned evenly to as many MACs: trained as the first `rate` was."""
    whole = _rates("middle")[0]
    pruned = dataclasses.replace(whole, epochs=whole.epochs - PRUNING_SMALL, share=DROPPED_SMALL, prune_epochs=PRUNING_SMALL)
    return [pruned, dataclasses.replace(pruned, evenly=True)]


def _chain(root: Point, codecs: Sequence[CodecSpec], epochs: Sequence[tuple[int, int]]) -> list[Point]:
    """A point for each codec, each from the one before it and the first from `root`; the last of `epochs` are those of all further ones."""
    points: list[Point] = []
    for number, codec in enumerate(codecs):
        frozen, together = epochs[min(number, len(epochs) - 1)]
        before = points[-1] if points else root
        points.append(dataclasses.replace(before, codec=codec, frozen_epochs=frozen, epochs=together, before=before))
    return points


def _uncoded() -> list[Point]:
    first, *rest = UNCODED
    root = Point("resnet20", WEIGHTS["resnet20"], CUTS["resnet20"]["last"], CodecSpec("raw-fp32", 64, 1, 8), *first)
    return [root, *_chain(root, [root.codec] * len(rest), rest)]


def uncoded(backbone: str) -> Point:
    """What `backbone`'s reference gets last: as many epochs of all as any split, without codec."""
    if backbone == "resnet20":
        return _uncoded()[-1]
    longest = _large(CUTS[backbone]["middle"], CodecSpec("raw-fp32", 32, 1, 8))
    least, most = min(PRUNED.values()), max(PRUNED.values())
    return _chain(longest, [longest.codec] * 2, [(0, PRUNING + least), (0, most - least)])[-1]
