"""Latency as the search predicts it against what the runtime takes, from picture to answer; `benchmarks/runtime.py` runs this and writes the results.

The prediction is `Costing`'s, from a profile of this machine and the payloads of validation images. What is measured goes through `coinfer edge` and
`coinfer link`, both processes of their own on one core, from a device half on another, with other images; nothing of that enters the prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from benchmarks.results_file import ROOT, compact, figure
from models.backbones import build_backbone
from models.cutting import cut_points
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.energy import board
from pipeline.costs.link import Link
from pipeline.costs.measure import forget_kept, measure_profile, untrained
from pipeline.costs.measure_plan import MeasurePlan
from pipeline.data import Split
from pipeline.files import atomic_write_text
from pipeline.networks import split_network, tables_of
from pipeline.onnx_export import OPSET, export_onnx
from pipeline.params import Codec, Search
from pipeline.runtime import coder
from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, EDGE, Bundle, open_session, write_bundle
from pipeline.runtime.coder import CodecTables
from pipeline.runtime.device import PARTS, DeviceHalf
from pipeline.runtime.dial import dial
from pipeline.runtime.images import encode_image
from pipeline.runtime.preprocess import Preprocessing
from pipeline.runtime.transport import Transport
from pipeline.search.candidate import INPUT, OUTPUT, Candidate
from pipeline.search.costing import Costing, Deployment
from pipeline.search.problem import Problem
from pipeline.search.trial_training import TrialTraining

BACKBONE, IMAGE_SIZE, SEED = "resnet20", 32, 0
RATES_MBPS, SLOWDOWNS, RTT_MS = (0.1, 0.5, 2.0, 10.0), (10.0, 40.0), 10.0
VISITS, IMAGES, WARMUP = 3, 12, 3  # of a place: timed images of each visit, and untimed ones before them
TRAIN_IMAGES, VALIDATION_SHARE, TEST_IMAGES = 1_200, 1 / 6, 600
PROFILE, SERVED = "runtime-predicted", "served"
SPACE = Search(
    trials=1,
    codec_steps=60,
    train_images=1_000,
    keep=[0.5, 1.0],
    codecs=["uniform", "rate"],
    code_channels=[4, 8, 16],
    strides=[1, 2],
    bits=[2, 3, 4],
    rate_weights=[0.002],
    images={"webp": [50]},
)

Raw = dict[str, Any]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Choice:
    """A candidate whose device half, at `pruned`, keeps half of whatever groups the search may prune there."""

    candidate: Candidate
    pruned: bool = False


CHOICES = (
    Choice(Candidate("layer1.0", code_channels=4, stride=2, bits=4)),
    Choice(Candidate("layer2.0", code_channels=8, stride=1, bits=3, codec="rate", rate_weight=0.002), pruned=True),
    Choice(Candidate("layer3.1", code_channels=16, stride=2, bits=4, codec="rate", rate_weight=0.002)),
    Choice(Candidate(OUTPUT)),
    Choice(Candidate(INPUT, quality=50, image_format="webp")),
)


@dataclass(frozen=True)
class Made:
    """A candidate's bundle, and the payload bytes of validation images, all that is known of a payload before anything is deployed."""

    candidate: Candidate
    bundle: Bundle
    payload_bytes: list[int]


def measure(
    example: Path = ROOT / "examples/cifar10",
    *,
    profile: DeviceProfile | None = None,
    choices: Sequence[Choice] = CHOICES,
    rates_mbps: Sequence[float] = RATES_MBPS,
    slowdowns: Sequence[float] = SLOWDOWNS,
    visits: int = VISITS,
    images: int = IMAGES,
    space: Search = SPACE,
) -> Raw:
    """Predicted and measured ms, by part and whole, of every choice at every rate and slowdown; the machine should do nothing else.

    `example` holds data/train/CLASS/*, data/test/CLASS/* and the weights of the backbone; without `profile` one of this machine is measured before.
    """
    train, test = (_images(example / "data" / name, count) for name, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)))
    backbone = build_backbone(BACKBONE, 10, IMAGE_SIZE, example / "weights" / f"{BACKBONE}-cifar10jpeg.safetensors").eval()
    cores = sorted(os.sched_getaffinity(0))
    known = profile or _profile()
    with tempfile.TemporaryDirectory(prefix="coinfer-") as folder, pinned(cores[0]):
        problem = Problem(backbone, cut_points(backbone, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)), space, Codec(), known.channel_block)
        held_back = int(len(train[1]) * VALIDATION_SHARE)
        trained, judged = (train[0][held_back:], train[1][held_back:]), train[0][:held_back]
        makes = _made(problem, choices, trained, judged.numpy(), Path(folder))
        places = _predicted(problem, makes, known, rates_mbps, slowdowns)
        _measured(places, makes, test[0].numpy(), Path(folder) / SERVED, visits, images, cores[-1])
    candidates = [{"label": made.candidate.label(), **made.candidate.to_dict()} for made in makes]
    machine = {"name": known.name, "runtime": known.runtime, "machine": dict(known.machine), "threads": known.threads}
    return {"profile": machine, "candidates": candidates, "rtt_ms": RTT_MS, "places": places}


def figures(raw: Raw) -> Raw:
    """The figures of issue "One edge server, many devices": the error of the prediction, over all places and of each candidate."""
    missed = errors(raw["places"])
    low, median, high, worse = (float(value) for value in np.percentile(missed, [25, 50, 75, 90]))
    rates, slowdowns = (sorted({place[name] for place in raw["places"]}) for name in ("rate_mbps", "slowdown"))
    how = (
        f"|predicted / measured - 1| of the median time from picture to answer: {len(raw['candidates'])} candidates of ResNet-20 at "
        f"{', '.join(f'{rate:g}' for rate in rates)} Mbit/s, {raw['rtt_ms']:g} ms round trip, device slowed {' and '.join(f'{k:g}' for k in slowdowns)}x; "
        "predicted from a profile of this machine and the payloads of validation images"
    )
    found = {
        "predicted_error_median": figure(median, "share", f"{how}; median, spread: quartiles", n=len(missed), spread=(low, high)),
        "predicted_error_p90": figure(worse, "share", f"{how}; nine tenths are predicted better", n=len(missed)),
    }
    for number, candidate in enumerate(raw["candidates"]):
        own = missed[[place["candidate"] == number for place in raw["places"]]]
        spread = float(own.min()), float(own.max())
        found[f"predicted_error_median.{number + 1}"] = figure(float(np.median(own)), "share", f"of {candidate['label']} alone", n=len(own), spread=spread)
    return found


def errors(places: Sequence[Raw]) -> NDArray[np.float64]:
    """Of the predicted total, relative to the median measured, of each place."""
    return np.array([abs(place["predicted_ms"]["total_ms"] / np.median(place["measured_ms"]["whole_ms"]) - 1) for place in places])


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread, and the processes it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def program(*arguments: str | Path) -> Iterator[int]:
    """The port that `coinfer ARGUMENTS --port 0` listens on; it ends with the block."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().split()[-1])
        finally:
            process.terminate()


def _profile() -> DeviceProfile:
    """As `coinfer profile` measures it."""
    model, example = untrained(BACKBONE, 10, IMAGE_SIZE), torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    print("predicted: profile of this machine", file=sys.stderr, flush=True)
    found = measure_profile(PROFILE, BACKBONE, model, example, cut_points(model, example), MeasurePlan.load(ROOT / "profiles/measure.json"))
    forget_kept(PROFILE)
    return found


def _images(folder: Path, count: int) -> Split:
    """`count` of the images in `folder`/CLASS/*, of every class as many, in turns."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [sorted(path.iterdir())[: -(-count // len(classes))] for path in classes]
    chosen = [(path, label) for row in zip(*files, strict=True) for label, path in enumerate(row)][:count]
    preprocessing, pixels = Preprocessing(IMAGE_SIZE), []
    for path, _ in chosen:
        with Image.open(path) as image:
            pixels.append(preprocessing.pixels(image))
    return torch.from_numpy(np.stack(pixels)), torch.tensor([label for _, label in chosen])


def _made(problem: Problem, choices: Sequence[Choice], train: Split, validation: Pixels, folder: Path) -> list[Made]:
    """Every choice trained as a trial of the search is, and exported as `coinfer export` does."""
    training, found = TrialTraining(problem, train, SEED), []
    for number, choice in enumerate(choices):
        candidate = choice.candidate
        if choice.pruned:
            keep = {name: min(ratios) for name, ratios in problem.legal_keep(candidate.cut).items()}
            candidate = Candidate.from_dict(candidate.to_dict() | {"keep": keep})
        print(f"predicted: {candidate.label()}", file=sys.stderr, flush=True)
        found.append(_exported(problem, candidate, training, validation, folder / ("alone" if candidate.kind == "device-only" else SERVED) / str(number)))
    return found


def _exported(problem: Problem, candidate: Candidate, training: TrialTraining, validation: Pixels, out: Path) -> Made:
    preprocessing, plan = Preprocessing(IMAGE_SIZE), problem.plan(candidate.cut, dict(candidate.keep))
    files = {DEVICE_ONLY: export_onnx(problem.backbone, _two(), input_name="image", output_name="logits")}
    points: tuple[CodecTables, ...] = ()
    payload_bytes: list[int] = []
    if candidate.image_format is not None and candidate.quality is not None:
        files[EDGE] = files[DEVICE_ONLY]
        payload_bytes = [len(encode_image(pixels, candidate.image_format, candidate.quality)) for pixels in validation]
    elif candidate.kind == "split":
        torch.manual_seed(SEED)
        network = split_network(problem.backbone, problem.example, candidate, plan, problem.codec)
        training.run(network, candidate.cut, SEED, pruned=bool(candidate.keep))
        files |= _halves(network.eval().device_half(), network.edge_half())
        session = open_session(files[DEVICE], 1)
        sample, judged = (session.run(None, {"image": preprocessing.tensor(images)})[0] for images in (training.sample.numpy(), validation))
        points = tables_of(candidate, sample)
        payload_bytes = [len(coder.encode(symbols, points[0])) for symbols in judged]
    bundle = write_bundle(
        out,
        kind=candidate.kind,
        candidate=candidate.to_dict(),
        plan=plan.to_dict(),
        preprocessing=preprocessing,
        classes=[str(label) for label in range(10)],
        files=files,
        points=points,
        extra={"opset": OPSET},
    )
    return Made(candidate, bundle, payload_bytes)


def _halves(device: nn.Module, edge: nn.Module) -> dict[str, bytes]:
    with torch.no_grad():
        symbols = device.eval()(_two())
    on_device = export_onnx(device, _two(), input_name="image", output_name="symbols")
    return {DEVICE: on_device, EDGE: export_onnx(edge, symbols, input_name="symbols", output_name="logits")}


def _two() -> torch.Tensor:
    return torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)


def _predicted(problem: Problem, makes: Sequence[Made], profile: DeviceProfile, rates_mbps: Sequence[float], slowdowns: Sequence[float]) -> list[Raw]:
    """Every place with what the search predicts of it."""
    places, edge = [], profile.only(IMAGE_SIZE)
    for slowdown in slowdowns:
        for rate in rates_mbps:
            costing = Costing(problem, Deployment(edge.slowed(slowdown), edge, Link(rate, RTT_MS), board("raspberry-pi-4")), 10)
            for number, made in enumerate(makes):
                expected = costing.measurement(made.candidate, 0.0, made.payload_bytes, 0, 0, 0)
                predicted = {part: round(float(getattr(expected, part)), 4) for part in PARTS}
                place = {"candidate": number, "rate_mbps": rate, "slowdown": slowdown, "expected_frame_bytes": round(expected.frame_bytes, 2)}
                places.append(place | {"predicted_ms": predicted, "measured_ms": {}, "frame_bytes": []})
    return places


def _measured(places: Sequence[Raw], makes: Sequence[Made], test: Pixels, served: Path, visits: int, images: int, far: int) -> None:
    """Visit all places in random order, time and again, each time with `images` drawn anew; the edge and its links run on core `far`."""
    with ExitStack() as stack:
        with pinned(far):
            edge = stack.enter_context(program("edge", "--bundle", served))
            ports = {
                rate: stack.enter_context(program("link", "--to", f"127.0.0.1:{edge}", "--rate", str(rate), "--rtt", str(RTT_MS)))
                for rate in sorted({place["rate_mbps"] for place in places})
            }
        random = np.random.default_rng(SEED)
        for number in range(visits):
            print(f"predicted: visit {number + 1} of {visits}", file=sys.stderr, flush=True)
            for index in random.permutation(len(places)):
                place, drawn = places[index], test[random.choice(len(test), images, replace=False)]
                with closing(dial(f"127.0.0.1:{ports[place['rate_mbps']]}")) as transport:
                    _visit(place, DeviceHalf(makes[place["candidate"]].bundle, 1, place["slowdown"]), transport, drawn)


def _visit(place: Raw, half: DeviceHalf, transport: Transport, images: Pixels) -> None:
    """Add what each of `images` takes: from the picture to the answer by this process's clock, and by part as the answer says."""
    for number, pixels in enumerate((*images[:WARMUP], *images)):
        start_s = time.perf_counter()
        answer = half.classify(pixels, transport) if place["expected_frame_bytes"] else half.classify_locally(pixels)
        whole_ms = 1e3 * (time.perf_counter() - start_s)
        if number >= WARMUP:
            for part, ms in {**answer.parts, "whole_ms": whole_ms}.items():
                place["measured_ms"].setdefault(part, []).append(round(ms, 4))
            place["frame_bytes"].append(answer.frame_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", type=Path, default=ROOT / "examples/cifar10", help="folder with data and weights")
    parser.add_argument("--profile", type=Path, help="of this very machine, measured before")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of what was measured")
    given = parser.parse_args()
    raw = measure(given.example, profile=DeviceProfile.load(given.profile) if given.profile else None)
    atomic_write_text(given.out, compact(json.dumps(raw, indent=1, sort_keys=True, allow_nan=False)) + "\n")
    print(json.dumps({key: round(row["value"], 4) for key, row in figures(raw).items()}, indent=1))


if __name__ == "__main__":
    main()
