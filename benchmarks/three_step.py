"""The three-step framework against its baselines on CIFAR-10 (JPEG) -> results/three_step.json.

Needs the data and weights that `make cifar10 DATA=... WEIGHTS=...` puts into examples/cifar10. Points that results/three_step.json holds already, with
the same parameters and code, are not trained again, and the file is written after each one: stop it whenever you like, `--minutes` does it for you.
Each training takes one core; sweeps of different points (`--only`) may run side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.end_to_end import INT8, SLOWDOWNS, Place, Way, as_raw, grid, medians, through_link, time_parts, total_ms
from benchmarks.image_points import ImagePoint
from benchmarks.pruned_points import PrunedPoint
from benchmarks.results_file import RESULTS, ROOT, write
from benchmarks.split_points import costs_key, reference, reference_weights
from benchmarks.three_step_figures import LOSS, TEST_LOSS, TOLERANCE, figures_of, near, of_first_seeds, pooled, pruned_pairs
from benchmarks.three_step_points import CUTS, SEEDS, VECTOR, chains, every_point, uncoded
from benchmarks.three_step_training import STATE, WEIGHTS, alone
from benchmarks.three_step_ways import (
    EXAMPLE,
    device_only,
    device_only_in_int8,
    expected_ms,
    in_int8,
    of_image,
    of_pruned,
    of_split,
    raw_features,
    stream_cost,
)
from models.backbones import build_backbone
from models.cutting import cut_points
from pipeline.costs.link import Link
from pipeline.costs.measure import forget_kept, measure_profile
from pipeline.costs.measure_plan import MeasurePlan
from pipeline.data import load_card, load_split
from pipeline.inference import accuracy

NAME = "three_step"
TIMED_IMAGES, ROUNDS = 20, 5
STREAM_IMAGES = 512
RAW_IMAGE_BYTES = 3 * 32 * 32  # what sends more gains nothing by a faster device half
GIVE_UP = 0.02  # of accuracy on validation: a chain ends where a point loses more, as cheaper ones would too
CHECKED = 2  # places a slowdown where a real cut does best, which are measured through the link, with one more

Raw = dict[str, Any]


def run_end_to_end(raw: Raw) -> Raw:
    """Every way within 1 point on validation, timed; the grid; and the places where splitting does best again, through processes and link.

    What the search could propose is predicted by a profile of this machine, made first, as the search does; for the rest an earlier timing stands in.
    """
    best, points = raw["references"]["resnet20"], {point.name: point for point in every_point()}
    train, validation = load_split("train"), load_split("validation")
    ways: list[Way] = []
    for name, row in cheapest_alike(raw["points"], best).items():
        found, point = row["validation"], points[name]
        build = of_image if isinstance(point, ImagePoint) else of_pruned if isinstance(point, PrunedPoint) else of_split
        ways.append(build(point, found["accuracy"], found.get("frame_bytes", {"mean": 0.0})["mean"]))
    weights = str(reference_weights(uncoded("resnet20")))
    network = build_backbone("resnet20", load_card().num_classes, 32, Path(weights)).eval()
    local = device_only(network, "resnet20 device-only", accuracy(network, validation), ours=False)
    ways += [*raw_features("resnet20", weights, train, validation), local]
    ways += [device_only_in_int8(way, train, validation) for way in ways if way.sent == "nothing"]
    ways += [in_int8(way, train, validation) for way in ways if way.sent == "symbols" and way.frame_bytes < RAW_IMAGE_BYTES]
    images = validation[0].numpy()
    plan = MeasurePlan.load(ROOT / "profiles/measure.json")
    profile = measure_profile("three_step", "resnet20", network, EXAMPLE, cut_points(network, EXAMPLE), plan)
    forget_kept("three_step")
    predicted, measured = (
        {name: medians(parts) for name, parts in time_parts(ways, images[start : start + TIMED_IMAGES], ROUNDS).items()} for start in (0, TIMED_IMAGES)
    )
    by_profile = {way.name: expected_ms(way, profile, network, points.get(way.name.removesuffix(INT8))) for way in ways}
    predicted |= {name: parts for name, parts in by_profile.items() if parts}
    by_name, classes = {way.name: way for way in ways}, load_card().num_classes
    facts = [{fact: getattr(way, fact) for fact in ("name", "accuracy", "frame_bytes", "ours", "real_cut", "sent", "image_size")} for way in ways]
    timed = {"classes": classes, "ways": facts, "predicted": predicted, "measured": measured}
    places = places_of(raw | {"end_to_end": timed})
    checked = []
    for slowdown in SLOWDOWNS:
        for place in worth_checking([place for place in places if place.slowdown == slowdown], by_name):
            compared = [by_name[name] for name in dict.fromkeys((place.pick, place.baseline, place.cut)) if name]
            link = Link(place.rate_mbps, place.rtt_ms)
            times = through_link(compared, images[: 2 * TIMED_IMAGES], slowdown, link)
            row = {name: getattr(place, name) for name in ("slowdown", "rate_mbps", "rtt_ms", "pick", "baseline", "cut")}
            row["computed_ms"] = {way.name: total_ms(way, measured[way.name], slowdown, link, classes) for way in compared}
            checked.append(row | {"ms": {name: [round(ms, 3) for ms in values] for name, values in times.items()}})
    pairs = {where: _pruned_pair(raw, points, cut) for where, cut in CUTS["resnet56"].items()}
    halves = {where: time_parts([way for _, way in pair], images[:TIMED_IMAGES], ROUNDS) for where, pair in pairs.items() if pair}
    pruned = {where: {name: parts["device_ms"] for name, parts in times.items()} for where, times in halves.items()}
    names = [*by_name, *itertools.chain.from_iterable(pruned.values())]
    streams = [{"way": way.name, **stream_cost(way, validation[0][:STREAM_IMAGES])} for way in ways if way.ours and way.name in points]
    return timed | {
        "keys": {"": best["key"]} | {name: raw["points"][name]["key"] for name in names if name in raw["points"]},
        "coder": streams,
        "by_profile": sorted(name for name, parts in by_profile.items() if parts),
        "through_link": checked,
        "pruned": pruned,
    }


def places_of(raw: Raw) -> list[Place]:
    """The grid, from what was timed and the rows as they are now: a further seed may move a mean below what must hold on test."""
    best, timed, means = raw["references"]["resnet20"], raw["end_to_end"], of_first_seeds(raw["points"])
    ways = []
    for facts in timed["ways"]:
        row = raw["points"].get(facts["name"].removesuffix(INT8))
        mean = means.get(row["key"]) if row else None
        ways.append(Way(**facts, holds=mean is not None and "test" in mean and near(mean, best, "test", TEST_LOSS)))
    return grid(ways, timed["predicted"], timed["measured"], best["validation"] - LOSS - TOLERANCE, timed["classes"])


def worth_checking(places: Sequence[Place], ways: Mapping[str, Way]) -> list[Place]:
    """Of one slowdown: where a real cut comes nearest to the best baseline or beats it most, and one of the others, if possible one where the pick sends."""
    cut = [place for place in places if place.cut_ms is not None]
    best = sorted(cut, key=lambda place: (place.cut_ms or 0) / place.baseline_ms)[:CHECKED]
    others = [place for place in places if place not in best]
    sending = [place for place in others if ways[place.pick].sent != "nothing"] or others
    return [*best, *sending[len(sending) // 2 :][:1]]


def cheapest_alike(rows: Mapping[str, Raw], best: Raw) -> dict[str, Raw]:
    """Of the ResNet-20 rows within a point of `best` those that could win: of what differs in quality or rate weight alone, the one of fewest bytes."""
    found: dict[tuple[Any, ...], tuple[str, Raw]] = {}
    means = of_first_seeds(rows)
    for name, row in rows.items():
        point, codec = row["point"], row["point"].get("codec", {})
        kind = codec.get("kind", "")
        if point["backbone"] != "resnet20" or kind == "multi-rate" or kind.startswith("jscc") or not (row["key"] in means and near(means[row["key"]], best)):
            continue
        if codec and point["cut"] == VECTOR:  # the device has classified
            continue
        alike: tuple[Any, ...] = (name,)
        if "image_format" in point:
            alike = point["image_format"], "lossless" in name
        elif codec:
            alike = point["cut"], kind, codec["code_channels"], codec["stride"], codec["bits"], point["share"], point["evenly"]
        if alike not in found or row["validation"]["frame_bytes"]["mean"] < found[alike][1]["validation"]["frame_bytes"]["mean"]:
            found[alike] = name, row
    return dict(found.values())


def _pruned_pair(raw: Raw, points: dict[str, Any], cut: str) -> list[tuple[Raw, Way]]:
    """The unpruned and the pruned split of ResNet-56 at `cut`, if both are trained."""
    pairs = [pair for pair in pruned_pairs(raw["points"].values()) if pair[0]["point"]["cut"] == cut]
    named = {row["key"]: points[name] for name, row in raw["points"].items()}
    return [(row, of_split(named[row["key"]], row["validation"]["accuracy"], row["validation"]["frame_bytes"]["mean"])) for row in itertools.chain(*pairs[:1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further point after this long")
    parser.add_argument("--only", default="", help="only points whose name holds this")
    parser.add_argument("--seed", type=int, choices=SEEDS, default=0)
    parser.add_argument("--trained", action="store_true", help="train nothing; measure what was trained")
    parser.add_argument("--time", action="store_true", help="train nothing; time all that was trained, and the grid of devices and links")
    arguments = parser.parse_args()
    os.chdir(ROOT / "examples/cifar10")
    start = time.monotonic()

    if arguments.time:
        found = run_end_to_end(known())
        with changed() as raw:
            raw["end_to_end"] = found
        return

    def in_time() -> bool:
        return (time.monotonic() - start) / 60 < arguments.minutes

    def referred(backbone: str) -> Raw | None:
        """The reference's row, which is trained unless it is known; None if time is up."""
        row: Raw | None = known()["references"].get(backbone)
        if in_time() and (row is None or not reference_weights(uncoded(backbone)).exists()):
            row = reference(uncoded(backbone))
            with changed() as raw:
                raw["references"][backbone] = row
        return row

    def measured(point: Any) -> Raw | None:
        """The row of `point`, which is trained unless it is known; None if time is up."""
        if point.weights not in WEIGHTS.values() and referred(point.backbone) is None:  # made of the reference
            return None
        if (row := known()["points"].get(point.name)) or not in_time() or (arguments.trained and not _is_trained(point)):
            return row
        began = time.perf_counter()
        fields = asdict(point) | {"before": point.before.key() if point.before else None}
        row = {"key": point.key(), "point": fields, **point.facts(), "costs": costs_key(), "validation": point.judged(load_split("validation"))}
        row["seconds"] = round(time.perf_counter() - began, 1)
        with changed() as raw:
            raw["points"][point.name] = row
        return row

    wanted = [[point for point in chain if arguments.only in point.name] for chain in chains(arguments.seed)]
    for chain in wanted:
        for point in chain:
            row, best = measured(point), known()["references"].get(point.backbone)
            if row is None or (best and not near(row, best, loss=GIVE_UP)):
                break
    for backbone in CUTS:
        if arguments.only in uncoded(backbone).name:
            referred(backbone)
    judge_on_test()


def _is_trained(point: Any) -> bool:
    return (isinstance(point, ImagePoint) and not point.epochs) or (STATE / f"{point.key()}.safetensors").exists()


def judge_on_test() -> None:
    """Of the points within the loss on validation, means over seeds, and of the halves whose pruning is judged, those that were not yet."""
    points = {point.key(): point for point in every_point()}
    for key in to_be_judged(known()):
        with alone(f"{key}-test"):
            if key not in to_be_judged(known()):
                continue
            found = points[key].judged(load_split("test"))
            with changed() as raw:
                for row in raw["points"].values():
                    if row["key"] == key:
                        row["test"] = found


def to_be_judged(raw: Raw) -> list[str]:
    rows = [row for row in pooled(raw["points"]) if (best := raw["references"].get(row["point"]["backbone"])) and near(row, best)]
    single = [each for row in rows for each in row["of_seeds"]] + [row for pair in pruned_pairs(raw["points"].values()) for row in pair]
    return list(dict.fromkeys(row["key"] for row in single if "test" not in row))


@contextmanager
def changed() -> Iterator[Raw]:
    """`known()`, to be changed and then written; sweeps side by side take turns."""
    with alone("results"):
        raw = known()
        yield raw
        if "end_to_end" in raw:
            raw["end_to_end"]["grid"] = as_raw(places_of(raw))
        seeds = sorted({row["point"].get("seed", 0) for row in raw["points"].values()})
        write(NAME, dataset={"name": "CIFAR-10 (JPEG)", "hash": load_card().sha256}, seeds=seeds, figures=figures_of(raw), raw=raw)


def known() -> Raw:
    """What the results file holds of what is still wanted, trained and measured as it would be now."""
    file = RESULTS / f"{NAME}.json"
    raw: Raw = json.loads(file.read_text())["raw"] if file.exists() else {"points": {}, "references": {}}
    raw["points"] = current(raw)
    raw["references"] = {backbone: row for backbone, row in raw["references"].items() if row["key"] == uncoded(backbone).key()}
    if timed := raw.get("end_to_end"):
        keys = {name: row["key"] for name, row in (raw["points"] | {"": raw["references"].get("resnet20", {"key": None})}).items()}
        if any(keys.get(name) != key for name, key in timed["keys"].items()):
            del raw["end_to_end"]
    return raw


def current(raw: Raw) -> Raw:
    """The rows of points that are still wanted and were trained and measured as they would be now."""
    wanted, costs = {point.name: point.key() for point in every_point()}, costs_key()
    return {name: row for name, row in raw["points"].items() if (row["key"], row["costs"]) == (wanted.get(name), costs)}


if __name__ == "__main__":
    main()
