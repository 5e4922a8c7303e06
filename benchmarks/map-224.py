"""Where would splitting pay at 224 pixels? Latency and bytes of MobileNetV3-small and ResNet-18 at every cut; random weights, so nothing about accuracy.

Images are crops of the two photographs that scikit-learn brings. One thread; slower devices and links by the formula of METHODS 4. A code counts with all its
bits: what entropy coding saves of them only a trained network could say. Every device half runs in float32 and, quantised with the crops, in int8.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.end_to_end import SLOWDOWNS, TIMED, Way, frame_size, medians, time_parts, total_ms
from benchmarks.results_file import RESULTS, figure, track, write
from models.backbones import build_backbone
from models.codec import CodecSpec
from models.coinference import build_split
from models.cutting import cut_points
from pipeline.costs.link import Link
from pipeline.errors import ModelError
from pipeline.files import atomic_path
from pipeline.inference import outputs
from pipeline.onnx_export import export_onnx
from pipeline.quantising import quantise
from pipeline.runtime import coder
from pipeline.runtime.images import Format, encode_image
from pipeline.runtime.preprocess import Preprocessing

NAME = "map-224"
BACKBONES = ("mobilenet_v3_small", "resnet18")
IMAGE_MARKERS: dict[Format, str] = {"webp": "x", "jpeg": "+", "jpeg-bare": "1"}
CODES = ((16, 8, 2), (16, 4, 2), (32, 2, 4))  # channels, stride, bits
QUALITIES = (75, 50, 30)
SIZE, CLASSES = 224, 1000
RATES_MBPS = tuple(float(rate) for rate in np.geomspace(0.02, 20, 13))
RTT_MS = 20.0
EXAMPLE = torch.zeros(2, 3, SIZE, SIZE)
TIMED_IMAGES, ROUNDS = 4, 3


def crops() -> NDArray[np.uint8]:
    """(N, 3, 224, 224): a grid over each photograph."""
    found = []
    for photo in load_sample_images().images:
        for top, left in itertools.product(range(0, photo.shape[0] - SIZE + 1, 100), range(0, photo.shape[1] - SIZE + 1, 200)):
            found.append(photo[top : top + SIZE, left : left + SIZE].transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(found))


def ways(name: str, images: NDArray[np.uint8]) -> Iterator[Way]:
    """Edge-only in some formats and qualities, device-only, and a split at every cut with every code that fits it."""
    torch.manual_seed(0)
    backbone = build_backbone(name, CLASSES, SIZE).eval()
    whole = export_onnx(backbone, EXAMPLE, input_name="image", output_name="logits")
    plain = Way("", 0.0, 0.0, ours=False, real_cut=False, sent="image", image_size=SIZE)
    for image_format, quality in itertools.product(IMAGE_MARKERS, QUALITIES):
        sizes = [len(encode_image(image, image_format, quality)) for image in images]
        label = f"{name} {image_format} q{quality}"
        yield replace(plain, name=label, frame_bytes=frame_size(sizes), edge=whole, image_format=image_format, quality=quality)
    yield replace(plain, name=f"{name} device-only", sent="nothing", device=whole)
    for cut, (channels, stride, bits) in itertools.product(cut_points(backbone, EXAMPLE)[1:-1], CODES):
        try:
            network = build_split(backbone, EXAMPLE, cut.name, CodecSpec("uniform", channels, stride, bits)).eval()
        except ModelError:
            continue
        if len(cut.shape) != 3:
            continue
        half = network.device_half()
        symbols = outputs(half, torch.from_numpy(images))
        tables = coder.build_tables(symbols.numpy(), bits)
        yield Way(
            f"{name} {cut.name} {channels}ch /{stride} {bits}bit",
            0.0,
            frame_size([-(-symbols[0].numel() * bits // 8)]),
            ours=True,
            real_cut=True,
            sent="symbols",
            image_size=SIZE,
            device=export_onnx(half, EXAMPLE, input_name="image", output_name="symbols"),
            edge=export_onnx(network.edge_half(), symbols[:2], input_name="symbols", output_name="logits"),
            tables=tables,
            shape=network.codec.code_shape,
        )


def in_int8(way: Way, images: NDArray[np.uint8]) -> Way:
    """`way` with its device half in int8."""
    assert way.device is not None
    tensor = Preprocessing(SIZE).tensor
    return replace(way, name=f"{way.name}, int8", device=quantise(way.device, (tensor(image[None]) for image in images)))


def picture(rows: list[dict[str, Any]]) -> Figure:
    """What every split asks of device and link, a panel for each backbone; edge-only as points, device-only as lines."""
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name in zip(drawn.subplots(1, len(BACKBONES)), BACKBONES, strict=True):
        mine = [row for row in rows if row["backbone"] == name]
        for colour, code in enumerate(sorted({row["code"] for row in mine if row["code"]})):
            for style, int8 in (("-", False), ("--", True)):
                points = [_spent(row) for row in mine if (row["code"], row["int8"]) == (code, int8)]
                axes.plot(*zip(*points, strict=True), f"C{colour}{style}", marker="o", markersize=3, linewidth=1, label=f"{code}{', int8' * int8}")
        for image_format, marker in IMAGE_MARKERS.items():
            points = [_spent(row) for row in mine if row["name"].startswith(f"{name} {image_format} ")]
            axes.plot(*zip(*points, strict=True), color="black", marker=marker, linestyle="none", label=f"edge-only, {image_format}")
        for row in mine:
            if not row["code"] and not row["frame_bytes"]:
                style = "--" if row["int8"] else "-"
                axes.axvline(row["ms"]["device_ms"], color="0.5", linestyle=style, linewidth=1, label=row["name"].removeprefix(f"{name} "))
        axes.set_yscale("log")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("device, ms per image (one core of this machine)")
        axes.set_ylabel("frame bytes")
        axes.set_title(f"{name}, 224 px: latency only", fontsize="medium")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    return drawn


def _spent(row: dict[str, Any]) -> tuple[float, float]:
    """(ms on the device, bytes)."""
    return row["ms"]["device_ms"] + row["ms"]["encode_ms"], row["frame_bytes"]


if __name__ == "__main__":
    images = crops()
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for name in BACKBONES:
        every = list(ways(name, images))
        every += [in_int8(way, images) for way in every if way.device]
        times = {way: medians(parts) for way, parts in time_parts(every, images[:TIMED_IMAGES], ROUNDS).items()}
        for way in every:
            plain, _, precision = way.name.partition(", ")
            code = " ".join(plain.split()[2:]) if way.real_cut else ""
            rows.append({"backbone": name, "name": way.name, "code": code, "int8": bool(precision), "frame_bytes": way.frame_bytes, "ms": times[way.name]})
        for slowdown in SLOWDOWNS:
            best = (0.0, "")
            for rate in RATES_MBPS:
                link = Link(rate, RTT_MS)
                total = {way.name: total_ms(way, times[way.name], slowdown, link, CLASSES) for way in every}
                split = min((way.name for way in every if way.real_cut), key=total.__getitem__)
                other = min((way.name for way in every if not way.real_cut), key=total.__getitem__)
                best = max(best, (total[other] / total[split], f"{split} against {other} at {rate:.3g} Mbit/s, {RTT_MS:g} ms"))
            how = f"largest over {len(RATES_MBPS)} link rates of best baseline over best split, latency only, accuracy unknown: {best[1]}"
            figures[f"best_speedup.{name}.x{slowdown:g}"] = figure(best[0], "ratio", how, n=TIMED_IMAGES * ROUNDS * TIMED)
            print(name, slowdown, best, flush=True)
    with atomic_path(RESULTS / f"{NAME}.png") as temporary:
        picture(rows).savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    print(write(NAME, dataset={"name": "crops of scikit-learn's sample photographs"}, seeds=[0], figures=figures, raw={"rows": rows}))
    track(NAME)
