"""Stage `profile`: where the backbone can be cut, and what device and edge take for each part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from models.backbones import build_backbone
from models.cutting import CutPoint, cut_points
from pipeline.costs.device_profile import DeviceProfile, backbone_key
from pipeline.costs.measure import MeasurePlan, measure_profile
from pipeline.files import atomic_write_json, read_json
from pipeline.params import Params
from pipeline.paths import DATA_CARD, DevicePaths, profile_file

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

MEASURE = "measure"
FLOAT_BYTES = 4


def run(params: Params, device: str, tracker: Tracker) -> dict[str, Any]:
    """Write cuts.json, device.json and edge.json of `device`, and log what crosses and what has been computed at each cut.

    A committed profile makes the three files depend on nothing but inputs; `measure` times this machine now, by profiles/measure.json.

    Raises:
        ProfileError: a profile is missing, broken, or not of this backbone at this image size.
        ModelError: the backbone cannot be built or traced.
    """
    settings, paths = params.device(device), DevicePaths(device)
    classes = len(read_json(DATA_CARD, "the data card")["classes"])
    image_size = params.data.image_size
    key = backbone_key(params.backbone.name, image_size)
    model = build_backbone(params.backbone.name, classes, image_size).eval()
    example = torch.zeros(1, 3, image_size, image_size)
    cuts = cut_points(model, example, params.search.cuts)

    measured: list[DeviceProfile] = []

    def profile_of(name: str, slowdown: float) -> DeviceProfile:
        if name != MEASURE:
            profile = DeviceProfile.load(profile_file(name)).only(key)
        else:
            if not measured:
                measured.append(measure_profile("measured", params.backbone.name, model, example, cuts, MeasurePlan.load(profile_file(MEASURE))))
            profile = measured[0]
        profile.check_cuts(key, cuts)
        return profile.slowed(slowdown)

    on_device, on_edge = profile_of(settings.profile, settings.slowdown), profile_of(settings.edge_profile, settings.edge_slowdown)
    rows = [{**cut.to_dict(), "elements": cut.elements, "feature_bytes": _feature_bytes(cut)} for cut in cuts]
    atomic_write_json(paths.cuts, rows)
    on_device.save(paths.device_profile)
    on_edge.save(paths.edge_profile)

    tracker.log_params({"device_slowdown": on_device.slowdown, "edge_slowdown": on_edge.slowdown, "threads": on_device.threads, "runtime": on_device.runtime})
    summary = {
        "cuts": float(len(cuts)),
        "backbone_macs": float(cuts[-1].macs),
        "backbone_parameters": float(cuts[-1].params),
        "device_full_ms": on_device.backbone(key).full.median_ms,
        "edge_full_ms": on_edge.backbone(key).full.median_ms,
        "device_sum_over_full": on_device.backbone(key).sum_over_full,
    }
    tracker.log_metrics(summary)
    tracker.log_figure(_figure(cuts, on_device, key), "cuts.png")
    for path in (paths.cuts, paths.device_profile, paths.edge_profile):
        tracker.log_file(path)
    return {"cuts": rows, **summary}


def _feature_bytes(cut: CutPoint) -> int:
    """The crossing tensor uncoded: float32, or one byte a value for the image itself."""
    return cut.elements * (1 if cut.index == 0 else FLOAT_BYTES)


def _figure(cuts: list[CutPoint], profile: DeviceProfile, key: str) -> Figure:
    """Against the cut: device ms computed so far (with the device's slowdown), and bytes that would cross uncoded."""
    backbone = profile.backbone(key)
    so_far = np.cumsum([0.0, *(block.points[-1].median_ms / backbone.sum_over_full for block in backbone.blocks)])
    figure = Figure(figsize=(max(6, 0.45 * len(cuts)), 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    names = [cut.name for cut in cuts]
    above.bar(names, so_far)
    above.set_ylabel("device ms up to the cut")
    figure.suptitle(f"{key}: {profile.runtime}, {profile.threads} thread{'s' * (profile.threads > 1)}, slowdown {profile.slowdown:g}", fontsize="medium")
    below.bar(names, [_feature_bytes(cut) for cut in cuts])
    below.axhline(_feature_bytes(cuts[0]), linestyle=":", color="black", label="the image, uncoded")
    below.set_ylabel("feature bytes, uncoded")
    below.set_yscale("log")
    below.tick_params(axis="x", rotation=90)
    below.legend()
    return figure
