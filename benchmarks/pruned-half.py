"""Is a ResNet-20 device half with half its channels faster in ONNX Runtime? Both halves in turns, one thread, 32x32 images."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import figure, write
from models.backbones import build_backbone
from models.cutting import count_macs, cut_points, split
from models.pruning import prune_head
from pipeline.onnx_export import export_onnx
from pipeline.runtime.bundle import open_session

CUTS = ("layer1.2", "layer2.2", "layer3.2")
ROUNDS = 400

if __name__ == "__main__":
    torch.manual_seed(0)
    backbone, example = build_backbone("resnet20", 10, 32).eval(), torch.zeros(1, 3, 32, 32)
    cuts = cut_points(backbone, example)
    image = {"image": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}
    figures, raw = {}, {}
    for cut in CUTS:
        blocks = {point.name: point.layers for point in cuts[1 : [point.name for point in cuts].index(cut) + 1]}
        head, _ = split(backbone, example, cut)
        pruned, _ = prune_head(head, example, dict.fromkeys(blocks, 0.5), blocks)
        whole, half = (open_session(export_onnx(part, example, input_name="image", output_name="feature"), 1) for part in (head, pruned))
        samples: dict[str, list[float]] = {"whole": [], "half": []}
        for turn in range(ROUNDS + 20):
            for name, session in (("whole", whole), ("half", half)):
                start = time.perf_counter()
                session.run(None, image)
                if turn >= 20:
                    samples[name].append((time.perf_counter() - start) * 1e3)
        speedup = np.median(samples["whole"]) / np.median(samples["half"])
        macs = sum(count_macs(pruned, example).values()) / sum(count_macs(head, example).values())
        raw[cut] = {name: [round(value, 5) for value in values] for name, values in samples.items()}
        figures[f"speedup.{cut}"] = figure(float(speedup), "ratio", "median of the whole half over median of the one with half its channels", n=ROUNDS)
        figures[f"macs_kept.{cut}"] = figure(macs, "share", "MACs left; the cut's own channels stay")
        print(cut, f"{speedup:.2f}x with {macs:.0%} of the MACs")
    print(write("pruned-half", dataset={"name": "random images"}, seeds=[0], figures=figures, raw=raw))
