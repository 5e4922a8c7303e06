"""MobileNetV3-small at 224 px, from prepare to evaluate, in a fresh clone: that nothing assumes small images. Its accuracy is a guess's.

The images are 500 of those that `make cifar10 DATA=...` left in examples/cifar10/data, made larger.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pipeline_figures import collect, fresh_clone, noop_repro, timed
from benchmarks.results_file import ROOT, write
from pipeline.files import atomic_write_json, read_json

DATA = ROOT / "examples/cifar10/data"
PER_CLASS = {"train": 40, "test": 10}
LARGE = (300, 256)
TRAINING = {"epochs": 1, "batch_size": 32, "learning_rate": 0.05, "crop_padding": 16, "flip": True}
EDITS: dict[str, dict[str, Any]] = {
    "data": {"source": "folder", "path": "data/large", "image_size": 224},
    "backbone": {"name": "mobilenet_v3_small"},
    "pretrain": TRAINING,
    "search": {"trials": 5, "codec_steps": 4, "train_images": 64, "batch_size": 16, "keep": [0.5, 1.0], "bits": [2, 4], "images": {"webp": [90, 30]}},
    "objective": {"max_accuracy_drop": 0.9, "minimize": "wire_bytes"},
    "finetune": TRAINING,
    "evaluate": {"latency_images": 20, "warmup_images": 2},
}
CAMERA = {"profile": "measure", "slowdown": 5, "edge_profile": "measure", "memory_mb": 4, "link": {"rate_mbps": 1.0, "rtt_ms": 10}}
PLAN = {"passes": 1, "chains": 100, "halves": 12, "edge_halves": 4, "int8_halves": 4, "image_sizes": []}


def enlarge(into: Path) -> None:
    """The first images of every class of `DATA`, as an image folder of large JPEGs."""
    for split, count in PER_CLASS.items():
        for kind in sorted(path for path in (DATA / split).iterdir() if path.is_dir()):
            (into / split / kind.name).mkdir(parents=True)
            for path in sorted(kind.iterdir())[:count]:
                with Image.open(path) as image:
                    image.resize(LARGE, Image.Resampling.BICUBIC).save(into / split / kind.name / f"{path.stem}.jpg", quality=95)


if __name__ == "__main__":
    if not DATA.exists():
        sys.exit(f"{DATA} is missing; run `make cifar10 DATA=...` first, which unpacks the images there.")
    with fresh_clone():
        enlarge(Path("data/large"))
        params = yaml.safe_load(Path("params.yaml").read_text())
        for section, values in EDITS.items():
            params[section] |= values
        params["devices"]["camera"] |= CAMERA
        Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        plan = Path("profiles/measure.json")
        atomic_write_json(plan, read_json(plan, "the measuring plan") | PLAN)
        figures, raw, dataset, seeds = collect("camera", timed("dvc", "repro"), noop_repro())
        print(write("mobilenet-224", dataset=dataset | {"name": "500 images of CIFAR-10 (JPEG), enlarged"}, seeds=seeds, figures=figures, raw=raw))
