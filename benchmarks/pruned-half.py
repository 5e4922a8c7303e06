"""Is a device half with half its channels faster in ONNX Runtime? Both halves in turns, one thread, random weights: nothing here is about accuracy."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import figure, write
from models.backbones import build_backbone
from models.cutting import CutPoint, count_macs, cut_points, split
from models.pruning import prune_head
from pipeline.networks import layers_up_to
from pipeline.onnx_export import export_onnx
from pipeline.runtime.bundle import open_session

STAGES = {"resnet20": ("layer1.2", "layer2.2", "layer3.2"), "resnet56": ("layer1.8", "layer2.8", "layer3.8")}  # at 32 px, the ends of the stages
AT_224 = ("resnet18", "alexnet", "vgg11_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")
SHARE = 0.6  # of the MACs that those devices compute at most
KEEP = 0.5
CHANNEL_BLOCK = 8
SECONDS = 12.0  # for each pair
LEAST_ROUNDS = 40


def middle(cuts: list[CutPoint]) -> str:
    """The last cut by which at most SHARE of the MACs are done."""
    return [cut.name for cut in cuts[1:-1] if cut.macs <= SHARE * cuts[-1].macs and len(cut.shape) == 3][-1]


if __name__ == "__main__":
    torch.manual_seed(0)
    figures, raw = {}, {}
    for name, size in [*((name, 32) for name in STAGES), *((name, 224) for name in AT_224)]:
        backbone, example = build_backbone(name, 10, size).eval(), torch.zeros(1, 3, size, size)
        cuts = cut_points(backbone, example)
        image = {"image": np.random.default_rng(0).normal(size=tuple(example.shape)).astype(np.float32)}
        for cut in STAGES.get(name, (middle(cuts),)):
            blocks = layers_up_to(cuts, cut)
            head, _ = split(backbone, example, cut)
            pruned, _ = prune_head(head, example, dict.fromkeys(blocks, KEEP), blocks, CHANNEL_BLOCK, cut_channels=True)
            parts = {"whole": head, "half": pruned}
            sessions = {each: open_session(export_onnx(part, example, input_name="image", output_name="feature"), 1) for each, part in parts.items()}
            samples: dict[str, list[float]] = {"whole": [], "half": []}
            started = time.perf_counter()
            while time.perf_counter() - started < SECONDS or len(samples["half"]) < LEAST_ROUNDS + 5:
                for each, session in sessions.items():
                    start = time.perf_counter()
                    session.run(None, image)
                    samples[each].append((time.perf_counter() - start) * 1e3)
            samples = {each: values[5:] for each, values in samples.items()}
            low, middle_ms, high = np.percentile(samples["half"], (25, 50, 75))
            whole = np.median(samples["whole"])
            macs = sum(count_macs(pruned, example).values()) / sum(count_macs(head, example).values())
            key = f"{name}.{cut}"
            raw[key] = {each: [round(value, 4) for value in values[:400]] for each, values in samples.items()}
            how = f"median of the whole half over median of the one with half its channels, {size} px"
            spread = (float(whole / high), float(whole / low))
            figures[f"speedup.{key}"] = figure(float(whole / middle_ms), "ratio", how, n=len(samples["half"]), spread=spread)
            figures[f"macs_kept.{key}"] = figure(macs, "share", f"MACs left; groups keep {KEEP:g} of their channels in multiples of {CHANNEL_BLOCK}")
            print(f"{key}: {whole / middle_ms:.2f}x with {macs:.0%} of the MACs", flush=True)
    print(write("pruned-half", dataset={"name": "random images"}, seeds=[0], figures=figures, raw=raw))
