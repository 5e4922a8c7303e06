"""Measuring a DeviceProfile, on this machine or by a profile agent on another: random chains of kernels, pruned halves of a backbone, and all else a candidate
needs, each through ONNX Runtime as it is deployed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from models.backbones import build_backbone
from models.cutting import CutPoint, cut_points
from pipeline.costs.chains import random_chains
from pipeline.costs.device_profile import DeviceProfile, WholeNetwork, backbone_key
from pipeline.costs.kernel_call import KernelCall
from pipeline.costs.latency_model import RunTime
from pipeline.costs.measure_plan import MeasurePlan
from pipeline.costs.measured_times import CoderTimes, ImageTimes, Spread, checked_ms
from pipeline.costs.profiled import block_probe, channel_block, profiled_kernels
from pipeline.costs.random_halves import random_halves
from pipeline.errors import Interrupted, ModelError, ProfileError
from pipeline.files import atomic_write_bytes
from pipeline.onnx_export import export_onnx
from pipeline.params import Params
from pipeline.paths import DATA_CARD, STATE, profile_file
from pipeline.quantising import quantise
from pipeline.runtime.bench import Bench, CoderWork, ImageWork, LocalBench, ModelWork, Repeats, Samples, Work
from pipeline.runtime.bench_wire import packed, replied, reply, request, unpacked

KEPT = STATE / "profiling"
AT_ONCE, AT_ONCE_BYTES = 16, 64_000_000  # models that take turns: a small device holds each twice, prepacked
CALIBRATION_IMAGES = 4  # what a random network's integers stand for does not change its time
PLAIN_BLOCK = 4  # filters that ONNX Runtime's matrix product takes at once where there are no blocked layouts, as on Arm
PRECISIONS = ("fp32", "int8")


def measure_into(params: Params, path: Path, bench: Bench | None = None) -> DeviceProfile:
    """Measure `bench`, this machine if left out, for the backbone in `params`, and merge the result into the profile at `path`.

    Where no data were prepared the network gets 10 classes, which only the last layer's width shows.

    Raises:
        ProfileError: `path` holds another machine's profile or a slowed one, or is not a profile; or see `measure_profile`.
    """
    plan, bench = MeasurePlan.load(profile_file("measure")), bench or LocalBench()
    known = DeviceProfile.load(path) if path.exists() else None
    if known:
        found = bench.describe()
        coder = replace(known.coder, implementation=found["coder"])
        known.merged(replace(known, slowdown=1.0, coder=coder, **_device(found, plan)))  # refused now rather than after minutes of measuring
    classes = len(json.loads(DATA_CARD.read_text())["classes"]) if DATA_CARD.exists() else 10
    image_size = params.data.image_size
    model = untrained(params.backbone.name, classes, image_size)
    example = torch.zeros(1, 3, image_size, image_size)
    profile = measure_profile(path.stem, params.backbone.name, model, example, cut_points(model, example, params.search.cuts), plan, bench)
    merged = known.merged(profile) if known else profile
    merged.save(path)
    forget_kept(path.stem, bench)
    return merged


def forget_kept(name: str, bench: Bench | None = None) -> None:
    """Delete what `measure_profile` of this name has kept of `bench`, this machine if left out."""
    shutil.rmtree(_folder(name, bench or LocalBench()), ignore_errors=True)
    with suppress(OSError):  # others are measured still, or nothing was
        KEPT.rmdir()


def _folder(name: str, bench: Bench) -> Path:
    """What is kept of one measurement, apart from others'."""
    return KEPT / hashlib.sha256(f"{name}\n{bench.address}".encode()).hexdigest()[:16]


def untrained(backbone: str, classes: int, image_size: int) -> nn.Module:
    """The backbone with the same random weights every time, so that what was measured of it before an interruption is found again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(backbone, classes, image_size).eval()


def measure_profile(
    name: str, backbone_name: str, model: nn.Module, example: Tensor, cuts: Sequence[CutPoint], plan: MeasurePlan, bench: Bench | None = None
) -> DeviceProfile:
    """Measure `bench`, this machine if left out, with `model` (in eval mode) at the shape of `example` (B, 3, S, S), and all else a candidate needs.

    What is done is kept in .coinfer/profiling, so a measurement that was interrupted goes on when it is asked for again, until `forget_kept`: call that when
    the profile is where it should be.

    Raises:
        ModelError: the network cannot be exported or cut.
        ProfileError: a job cannot be measured there, or the profile agent is gone.
        Interrupted: Ctrl-C.
    """
    bench = bench or LocalBench()
    image_size = example.shape[-1]
    described = bench.describe()
    try:
        with _Progress(name) as progress:
            kept = _Kept(bench, described, plan.repeated, _folder(name, bench))
            block = _block(kept)
            progress.preparing(f"{plan.halves} halves of {backbone_name}")
            models, whole = _models(model, example, cuts, plan, block or PLAIN_BLOCK)
            jobs = _beside(plan, image_size)
            tasks: list[Task] = [*_batches(models, plan.passes)]
            tasks += [[(None, job) for job in jobs[start : start + AT_ONCE]] for start in range(0, len(jobs), AT_ONCE)]
            measured = _Measured(kept.folder)
            for task in progress.each(tasks):
                measured.add(task, kept.measure([job for _, job in task], models[whole["fp32"]] if task[0][0] is None else None))
    except KeyboardInterrupt:
        raise Interrupted(f"measuring was interrupted; what is measured is kept in {_folder(name, bench)}, run it again to go on from there.") from None
    profile = DeviceProfile(
        name=name,
        **_device(described, plan),
        nchwc_block=block,
        channel_block=block or PLAIN_BLOCK,
        kernels={call: Spread.of(ms) for call, ms in measured.kernels.items()},
        runs=measured.runs(),
        images=_image_times(measured, plan, image_size),
        networks={
            backbone_key(backbone_name, image_size): WholeNetwork(cuts[-1].macs, {precision: measured.time(index) for precision, index in whole.items()})
        },
        coder=_coder_times(measured, plan, described["coder"]),
    )
    return profile


def _device(described: Mapping[str, Any], plan: MeasurePlan) -> dict[str, Any]:
    return {"runtime": described["runtime"], "threads": plan.threads, "machine": described["machine"]}


def _models(model: nn.Module, example: Tensor, cuts: Sequence[CutPoint], plan: MeasurePlan, step: int) -> tuple[list[bytes], dict[str, int]]:
    """Every ONNX model to measure, and which of them are the whole network, by precision."""
    models = [chain.model for chain in random_chains(plan.chains)]
    whole = [export_onnx(model, example, input_name="image", output_name="logits")]
    random = torch.Generator().manual_seed(0)
    images = [torch.randn(1, *example.shape[1:], generator=random).numpy() for _ in range(CALIBRATION_IMAGES)]
    with suppress(ModelError):  # such a network has no int8 half either
        whole.append(quantise(whole[0], images))
    numbers = {precision: len(models) + index for index, precision in enumerate(PRECISIONS[: len(whole)])}
    on_device, on_edge = random_halves(model, example, cuts, (plan.halves, plan.edge_halves), step)
    quantised = [quantise(half, images) for half in on_device[: plan.int8_halves]] if len(whole) > 1 else []
    return [*models, *whole, *on_device, *on_edge, *quantised], numbers


def _beside(plan: MeasurePlan, image_size: int) -> list[Work]:
    """All that a device does beside its network."""
    jobs: list[Work] = []
    for size in sorted({*plan.image_sizes, image_size}):
        jobs.append(ImageWork("preprocess", size))
        for name, qualities in plan.qualities.items():
            for quality in qualities:
                jobs += [ImageWork("encode", size, name, quality), ImageWork("decode", size, name, quality)]
    return jobs + [work for symbols in plan.coder_symbols for work in (CoderWork("encode", symbols), CoderWork("decode", symbols))]


Task = list[tuple[int | None, Work]]  # a model's number, None for what is no model


def _batches(models: Sequence[bytes], passes: int) -> Iterator[Task]:
    """The models `passes` times in random order, as many at once as a small device can hold."""
    random = np.random.default_rng(0)
    for _ in range(passes):
        batch: Task = []
        size = 0
        for index in map(int, random.permutation(len(models))):
            if batch and (len(batch) == AT_ONCE or size + len(models[index]) > AT_ONCE_BYTES):
                yield batch
                batch, size = [], 0
            batch.append((index, ModelWork(models[index])))
            size += len(models[index])
        yield batch


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """What ONNX Runtime said of its own run, there or when it was kept, may be of any form."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ProfileError(f"what ONNX Runtime says of its run is not understood ({reason}); delete {folder} and measure again.") from error


class _Measured:
    """Samples of all passes, by job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernels: dict[KernelCall, list[float]] = defaultdict(list)
        self.calls: dict[int, tuple[KernelCall, ...]] = {}
        self.samples: dict[int | Work, list[float]] = defaultdict(list)

    def add(self, task: Task, found: Sequence[Samples]) -> None:
        for (index, job), samples in zip(task, found, strict=True):
            self.samples[job if index is None else index] += samples.ms
            if index is not None:
                with _understood(self.folder):
                    timed = profiled_kernels(onnx.load_from_string(samples.optimised), samples.events)
                    self.calls[index] = tuple(kernel.call for kernel in timed)
                    for kernel in timed:
                        self.kernels[kernel.call].append(checked_ms(kernel.ms, kernel.call.op))

    def time(self, job: int | Work) -> Spread:
        return Spread.of(self.samples[job])

    def runs(self) -> tuple[RunTime, ...]:
        """Every model's; those that call the same kernels are one."""
        same: dict[tuple[KernelCall, ...], list[float]] = defaultdict(list)
        for index, calls in sorted(self.calls.items()):
            same[calls] += self.samples[index]
        return tuple(RunTime(calls, *Spread.of(ms)) for calls, ms in same.items())


def _image_times(measured: _Measured, plan: MeasurePlan, image_size: int) -> dict[int, ImageTimes]:
    def side(work: Any, size: int) -> dict[Any, dict[int, Spread]]:
        return {name: {quality: measured.time(ImageWork(work, size, name, quality)) for quality in qualities} for name, qualities in plan.qualities.items()}

    sizes = sorted({*plan.image_sizes, image_size})
    return {size: ImageTimes(measured.time(ImageWork("preprocess", size)), side("encode", size), side("decode", size)) for size in sizes}


def _coder_times(measured: _Measured, plan: MeasurePlan, implementation: str) -> CoderTimes:
    few, many = plan.coder_symbols

    def line(work: Any) -> tuple[float, float]:
        at_few, at_many = (measured.time(CoderWork(work, count)).median_ms for count in (few, many))
        per_symbol = max((at_many - at_few) / (many - few), 0.0)
        return max(at_few - per_symbol * few, 0.0), per_symbol

    return CoderTimes(implementation, *line("encode"), *line("decode"))


def _block(kept: _Kept) -> int:
    """The channels that a block of the device's layouts holds, 0 where layouts are plain."""
    (probe,) = kept.measure([ModelWork(block_probe().SerializeToString())], None)
    with _understood(kept.folder):
        return channel_block(onnx.load_from_string(probe.optimised))


@dataclass
class _Kept:
    """Measures on `bench`, unless that was done before and only what came after was interrupted; named by device, repeats, models and jobs."""

    bench: Bench
    described: Mapping[str, Any]
    repeats: Repeats
    folder: Path

    def measure(self, jobs: Sequence[Work], beside: bytes | None) -> list[Samples]:
        fields, blob = request(jobs, self.repeats, beside)
        file = self.folder / f"{hashlib.sha256(packed({'device': self.described, **fields}, blob)).hexdigest()[:32]}.bin"
        if file.exists():
            try:
                return replied(*unpacked(file.read_bytes()))
            except (OSError, ProfileError):
                file.unlink(missing_ok=True)  # damaged: measured anew
        found = self.bench.measure(jobs, self.repeats, beside)
        atomic_write_bytes(file, packed(*reply(found)))
        return found


class _Progress:
    """A bar on a terminal; elsewhere silence."""

    def __init__(self, name: str) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self.name = name

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def preparing(self, what: str) -> None:
        self.task = self.bar.add_task(f"profile {self.name}: exporting {what}", total=None)

    def each(self, tasks: Sequence[Task]) -> Iterator[Task]:
        self.bar.update(self.task, description=f"profile {self.name}: measuring", total=len(tasks))
        for task in tasks:
            yield task
            self.bar.advance(self.task)
