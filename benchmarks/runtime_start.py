"""What starting a device costs: peak memory and time to the first prediction of ResNet-20, where nothing but the base dependencies is installed."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import figure
from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, EDGE, Bundle, write_bundle
from pipeline.runtime.preprocess import Preprocessing

ROOT = Path(__file__).resolve().parents[1]
RUNS, PICTURES = 9, 30
CUT = "layer2.0"


def uv(*arguments: str | Path, **env: str) -> None:
    """Run uv, the one beside this Python if there is one, with `env` added to the environment.

    Raises:
        subprocess.CalledProcessError: it failed; `stderr` says why.
    """
    program = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "uv"
    subprocess.run([program, *arguments], env={**os.environ, **env}, capture_output=True, text=True, check=True)


def build_wheel(folder: Path, **env: str) -> Path:
    """The wheel of this checkout, built in `folder` from a copy, so that nothing built before gets into it; `env` may name another compiler, `CC`."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("models", "pipeline"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, source, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def base_install(folder: Path) -> Path:
    """The programs of a new environment in `folder` that holds the wheel of this checkout and its base dependencies, byte-compiled as pip leaves them."""
    uv("venv", "--python", sys.executable, folder / "env")
    python = folder / "env/bin/python"
    uv("pip", "install", "--compile-bytecode", "--python", python, build_wheel(folder / "wheel"))
    return python.parent


def pictures(count: int) -> list[bytes]:
    """JPEG files of 640 x 480 pixels with coloured blots, the same in every run."""
    found = []
    for seed in range(count):
        blots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(blots).resize((640, 480), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def untrained_bundle(out: Path, code_channels: int = 8, backbone_name: str = "resnet20", cut: str = CUT) -> Bundle:
    """A split bundle in `out` of an untrained network for 32x32 pictures, 4-bit symbols, whose classes are balanced over `pictures`."""
    import torch

    from models.backbones import build_backbone
    from pipeline.networks import split_network, tables_of
    from pipeline.onnx_export import OPSET, export_onnx
    from pipeline.search.candidate import Candidate

    torch.manual_seed(0)
    preprocessing, example = Preprocessing(32), torch.zeros(2, 3, 32, 32)
    seen = torch.from_numpy(preprocessing.tensor(np.stack([preprocessing.pixels(Image.open(io.BytesIO(file))) for file in pictures(PICTURES)])))

    def balance(network: torch.nn.Module) -> None:
        [*_, classifier] = (layer for layer in network.modules() if isinstance(layer, torch.nn.Linear))
        classifier.bias -= network(seen).mean(0)

    candidate = Candidate(cut, code_channels=code_channels, stride=1, bits=4)
    with torch.no_grad():
        backbone = build_backbone(backbone_name, 10, 32).eval()
        balance(backbone)
        network = split_network(backbone, example, candidate).eval()
        balance(network)
        symbols = network.device_half()(seen)
    files = {
        DEVICE: export_onnx(network.device_half(), example, input_name="image", output_name="symbols"),
        EDGE: export_onnx(network.edge_half(), symbols, input_name="symbols", output_name="logits"),
        DEVICE_ONLY: export_onnx(backbone, example, input_name="image", output_name="logits"),
    }
    return write_bundle(
        out,
        kind="split",
        candidate=candidate.to_dict(),
        plan={},
        preprocessing=preprocessing,
        classes=[str(label) for label in range(10)],
        files=files,
        points=tables_of(candidate, symbols.numpy()),
        extra={"opset": OPSET},
    )


@contextlib.contextmanager
def edge_program(command: Sequence[str | Path], bundle: Path, *options: str) -> Iterator[str]:
    """The address of an edge that `command`, for instance ["coinfer"], serves `bundle` with; it ends with the block."""
    with subprocess.Popen([*command, "edge", "--bundle", bundle, "--port", "0", *options], stdout=subprocess.PIPE, text=True) as edge:
        assert edge.stdout is not None
        try:
            yield f"127.0.0.1:{edge.stdout.readline().split()[-1]}"
        finally:
            edge.terminate()


def start(coinfer: Path, bundle: Path, files: list[bytes], *options: str) -> tuple[float, float]:
    """Seconds from the start of `coinfer device` to its first record, and its peak resident memory, MB, once it has answered for all `files`."""
    begin_s = time.perf_counter()
    command = [coinfer, "device", "--bundle", bundle, "--source", "stdin", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as device:
        assert device.stdin is not None
        assert device.stdout is not None
        first_s = 0.0
        for file in files:
            device.stdin.write(file)
            assert b'"label"' in device.stdout.readline()
            first_s = first_s or time.perf_counter() - begin_s
        status = Path(f"/proc/{device.pid}/status").read_text()
        device.stdin.close()
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return first_s, int(peak_kib) * 1024 / 1e6


def measure() -> dict[str, list[float]]:
    """Samples of `first_prediction_s` and `device_rss_mb` through an edge on this machine, and of both `_alone` without one; files are in the page cache."""
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = untrained_bundle(Path(folder) / "bundle").path
        coinfer = base_install(Path(folder)) / "coinfer"
        files = pictures(PICTURES)
        with edge_program([coinfer], bundle) as address:
            ways = {"": ("--edge", address), "_alone": ()}
            for options in ways.values():
                start(coinfer, bundle, files, *options)
            for _ in range(RUNS):
                for suffix, options in ways.items():
                    first_s, peak_mb = start(coinfer, bundle, files, *options)
                    samples.setdefault(f"first_prediction_s{suffix}", []).append(first_s)
                    samples.setdefault(f"device_rss_mb{suffix}", []).append(peak_mb)
    return samples


def figures(raw: dict[str, list[float]]) -> dict[str, Any]:
    units = {"first_prediction_s": "s", "device_rss_mb": "MB"}
    hows = {
        "first_prediction_s": "from the start of `coinfer device` to its first record",
        "device_rss_mb": f"largest resident memory of `coinfer device` after {PICTURES} pictures of 640 x 480",
    }
    found = {}
    for name, samples in raw.items():
        key = name.removesuffix("_alone")
        low, middle, high = np.percentile(samples, [25, 50, 75])
        how = f"{hows[key]}, ResNet-20 {'alone' if name != key else 'through an edge on this machine'}, base install, median"
        found[name.replace("_alone", ".alone")] = figure(float(middle), units[key], how, n=len(samples), spread=(float(low), float(high)))
    return found
