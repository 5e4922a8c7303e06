"""Stage `profile`: where the backbone can be cut, and what device and edge take for each part of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from models.cutting import CutPoint, cut_points, segment_modules
from models.operations import Operation, chained, operations
from pipeline.costs.device_profile import DeviceProfile, backbone_key
from pipeline.costs.measure import forget_kept, measure_profile, untrained
from pipeline.costs.measure_plan import MeasurePlan
from pipeline.files import atomic_write_json, read_json
from pipeline.params import Params
from pipeline.paths import DATA_CARD, DevicePaths, profile_file

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

MEASURE, MEASURED = "measure", "measured"
FLOAT_BYTES = 4


def run(params: Params, device: str, tracker: Tracker) -> dict[str, Any]:
    """Write cuts.json, device.json and edge.json of `device`, and log what crosses and what has been computed at each cut.

    A committed profile makes the three files depend on nothing but inputs; `measure` times this machine now, by profiles/measure.json. A profile that was not
    measured with this backbone predicts it all the same, from kernels like its own; the log then says that this is less sure.

    Raises:
        ProfileError: a profile is missing, broken, or of another schema version.
        ModelError: the backbone cannot be built or traced.
    """
    settings, paths = params.device(device), DevicePaths(device)
    classes = len(read_json(DATA_CARD, "the data card")["classes"])
    image_size = params.data.image_size
    key = backbone_key(params.backbone.name, image_size)
    model = untrained(params.backbone.name, classes, image_size)
    example = torch.zeros(1, 3, image_size, image_size)
    cuts = cut_points(model, example, params.search.cuts)

    measured: list[DeviceProfile] = []
    remarks: set[str] = set()

    def profile_of(name: str, slowdown: float) -> DeviceProfile:
        if name != MEASURE:
            profile = DeviceProfile.load(profile_file(name))
        else:
            if not measured:
                measured.append(measure_profile(MEASURED, params.backbone.name, model, example, cuts, MeasurePlan.load(profile_file(MEASURE))))
            profile = measured[0]
        if remark := profile.remark(key, cuts[-1].macs):
            remarks.add(remark)
        return profile.only(image_size).slowed(slowdown)

    on_device, on_edge = profile_of(settings.profile, settings.slowdown), profile_of(settings.edge_profile, settings.edge_slowdown)
    for remark in sorted(remarks):
        print(f"profile {device}: {remark}", file=sys.stderr)
    rows = [{**cut.to_dict(), "elements": cut.elements, "feature_bytes": _feature_bytes(cut)} for cut in cuts]
    atomic_write_json(paths.cuts, rows)
    on_device.save(paths.device_profile)
    on_edge.save(paths.edge_profile)
    if measured:
        forget_kept(MEASURED)

    halves = _halves(model, example, cuts)
    device_ms = [on_device.half_ms(half) if half else 0.0 for half in halves]
    tracker.log_params(
        {
            "backbone_in_profiles": not remarks,
            "device_slowdown": on_device.slowdown,
            "edge_slowdown": on_edge.slowdown,
            "threads": on_device.threads,
            "runtime": on_device.runtime,
        }
    )
    summary = {
        "cuts": float(len(cuts)),
        "backbone_macs": float(cuts[-1].macs),
        "backbone_parameters": float(cuts[-1].params),
        "device_full_ms": device_ms[-1],
        "edge_full_ms": on_edge.half_ms(halves[-1]),
    }
    whole = on_device.network(key)
    if whole:
        summary["device_predicted_over_measured"] = device_ms[-1] / whole.median_ms
    tracker.log_metrics(summary)
    tracker.log_figure(_figure(cuts, device_ms, on_device, key), "cuts.png")
    for path in (paths.cuts, paths.device_profile, paths.edge_profile):
        tracker.log_file(path)
    return {"cuts": rows, **summary}


def _feature_bytes(cut: CutPoint) -> int:
    """The crossing tensor uncoded: float32, or one byte a value for the image itself."""
    return cut.elements * (1 if cut.index == 0 else FLOAT_BYTES)


def _halves(model: nn.Module, example: Tensor, cuts: Sequence[CutPoint]) -> list[tuple[Operation, ...]]:
    """The operations up to each of `cuts`, none up to the first."""
    halves: list[tuple[Operation, ...]] = [()]
    value = example
    for segment in segment_modules(model, example, cuts):
        computed = operations(segment, value)
        halves.append(chained(halves[-1], computed) if halves[-1] else computed)
        with torch.no_grad():
            value = segment(value)
    return halves


def _figure(cuts: list[CutPoint], device_ms: Sequence[float], profile: DeviceProfile, key: str) -> Figure:
    """Against the cut: predicted ms of the unpruned device half up to it (with the device's slowdown), and bytes that would cross uncoded."""
    figure = Figure(figsize=(max(6, 0.45 * len(cuts)), 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    names = [cut.name for cut in cuts]
    above.bar(names, device_ms)
    above.set_ylabel("device ms up to the cut")
    figure.suptitle(f"{key}: {profile.runtime}, {profile.threads} thread{'s' * (profile.threads > 1)}, slowdown {profile.slowdown:g}", fontsize="medium")
    below.bar(names, [_feature_bytes(cut) for cut in cuts])
    below.axhline(_feature_bytes(cuts[0]), linestyle=":", color="black", label="the image, uncoded")
    below.set_ylabel("feature bytes, uncoded")
    below.set_yscale("log")
    below.tick_params(axis="x", rotation=90)
    below.legend()
    return figure
