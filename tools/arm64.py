"""Does the runtime run on 64-bit Arm? Installs it in an arm64 root of Debian 12 (as Raspberry Pi OS 12), runs the device there under qemu-user, as on a
Raspberry Pi 4's processor, and compares what it predicts with what this machine does. Needs no root and no binfmt; takes a few minutes and some 400 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runtime_start import ROOT, build_wheel, edge_program, pictures, untrained_bundle, uv
from pipeline.errors import CoinferError
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.preprocess import IMAGE_SUFFIXES

SUITE, PYTHON, PLATFORM, PROCESSOR = "bookworm", "3.11", "aarch64-manylinux_2_28", "cortex-a72"
EMULATOR, BOOTSTRAP, COMPILER = "qemu-aarch64-static", "mmdebstrap", "aarch64-linux-gnu-gcc"
PICTURES = 12
# What ONNX Runtime, which ends without a word where it makes no sense of the processor, reads of it: one core of a Raspberry Pi 4 instead of this machine's.
CPU_FILES = {
    "proc/cpuinfo": """processor : 0
Features : fp asimd evtstrm crc32 cpuid
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x0
CPU part : 0xd08
CPU revision : 3
""",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
}

Records = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a split bundle; by default an untrained ResNet-20")
    parser.add_argument("--source", type=Path, help=f"a folder of images, {PICTURES} of which are taken; by default made ones")
    options = parser.parse_args()
    if missing := [program for program in (EMULATOR, BOOTSTRAP) if shutil.which(program) is None]:
        fail(f"needs {' and '.join(missing)}; on Debian: apt-get install qemu-user-static mmdebstrap gcc-aarch64-linux-gnu libc6-dev-arm64-cross.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            source = taken(options.source, folder / "pictures")
            bundle = Bundle.load(options.bundle.resolve()) if options.bundle else untrained_bundle(folder / "bundle")
            if bundle.kind != "split":
                fail(f"{options.bundle} is of kind {bundle.kind}; give a split bundle.")
            print(compare(folder, bundle.path, source, install(folder)))
        except CoinferError as error:
            fail(str(error))
        except subprocess.CalledProcessError as error:
            said = (error.stderr or str(error)).strip().splitlines()
            fail(f"{' '.join(map(str, error.cmd[:3]))} ... ended with {error.returncode}: {said[-1] if said else 'nothing said'}")


def fail(reason: str) -> NoReturn:
    raise SystemExit(f"arm64: {reason}")


def taken(source: Path | None, folder: Path) -> Path:
    """`folder` with the images to classify."""
    folder.mkdir()
    if source is None:
        for number, file in enumerate(pictures(PICTURES)):
            (folder / f"{number:02}.jpg").write_bytes(file)
        return folder
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        fail(f"{source} holds no image; give a folder of images.")
    for number, path in enumerate(found[:: -(-len(found) // PICTURES)]):
        shutil.copy(path, folder / f"{number:02}{path.suffix.lower()}")
    return folder


def install(folder: Path) -> list[str]:
    """Unpack an arm64 root in `folder`, install the wheels of that architecture beside it, and return the command that runs the command line there.

    Raises:
        subprocess.CalledProcessError: a program failed.
    """
    root, site, archive = folder / "root", folder / "site", folder / "root.tar"
    root.mkdir()
    print("unpacking an arm64 root", flush=True)
    packages = "--include=python3,libpython3-dev,libstdc++6"  # the latter's headers are for the coder
    run([BOOTSTRAP, "--variant=extract", "--architectures=arm64", packages, SUITE, archive], folder)
    run(["tar", "-xf", archive, "-C", root, "--no-same-owner", "--exclude=./dev/*"], folder)  # any user can then delete it
    archive.unlink()
    for name, text in CPU_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    print("installing the wheels", flush=True)
    compiler = COMPILER if shutil.which(COMPILER) else "false"
    headers = f"-I{root}/usr/include/python{PYTHON} -I{root}/usr/include"
    wheel = build_wheel(folder / "wheel", CC=compiler, LDSHARED=f"{compiler} -shared", CFLAGS=headers, _PYTHON_HOST_PLATFORM="linux-aarch64")
    uv("pip", "install", "--target", site, "--python-version", PYTHON, "--python-platform", PLATFORM, "--only-binary", ":all:", wheel)
    return [EMULATOR, "-cpu", PROCESSOR, "-L", str(root), "-E", f"PYTHONPATH={site}", f"{root}/usr/bin/python{PYTHON}", "-m", "pipeline.cli"]


def compare(folder: Path, bundle: Path, source: Path, there: list[str]) -> str:
    """Classify `source` there and here, on the device alone and through an edge here, and there with both coders; a sentence on what came out.

    Raises:
        subprocess.CalledProcessError: a program failed.
        SystemExit: predictions differ.
    """
    here = [sys.executable, "-m", "pipeline.cli"]
    device = ["device", "--bundle", str(bundle), "--source", str(source), "--deadline", "60000"]

    def records(command: list[str], *options: str) -> Records:
        return [json.loads(line) for line in run([*command, *device, *options], folder).splitlines()]

    far, labels = 0.0, set()
    with edge_program(here, bundle) as address:
        split = ("--edge", address)
        ways = {"alone": ((), "device-only"), "split": (split, "split")}
        for way, (options, path) in ways.items():
            print(f"classifying {way}", flush=True)
            expected, found = records(here, *options), records(there, *options)
            for ours, theirs in zip(expected, found, strict=True):
                if (ours["path"], theirs["path"]) != (path, path):
                    fail(f"{ours['file']} was to go {path}, but: {theirs.get('edge_error') or ours.get('edge_error')}")
                if ours["label"] != theirs["label"]:
                    fail(f"{ours['file']} is {theirs['label']} ({theirs['probability']}) on Arm and {ours['label']} ({ours['probability']}) here, {way}.")
                labels.add(ours["label"])
                far = max(far, abs(ours["probability"] - theirs["probability"]))
        coder = "the Python coder alone, as there is no " + COMPILER
        if compiled := list((folder / "site").glob("pipeline/runtime/_rans*.so")):
            print("classifying with the coder in Python", flush=True)
            compiled[0].unlink()
            again = records(there, *split)
            if [(each["label"], each["probability"], each["frame_bytes"]) for each in again] != [
                (each["label"], each["probability"], each["frame_bytes"]) for each in found
            ]:
                fail("the coder in Python and the one in C differ on Arm.")
            coder = "the coder in C and in Python alike"
    same = sum(ours["frame_bytes"] == theirs["frame_bytes"] for ours, theirs in zip(expected, found, strict=True))
    return (
        f"{len(found)} images, {len(labels)} labels, on an emulated {PROCESSOR}, alone and split with an edge here, {coder}: every label as on this machine, "
        f"probabilities within {far:.1g}, {same} of {len(found)} frames of the same size."
    )


def run(command: Sequence[str | Path], folder: Path) -> str:
    """What `command` prints, run in `folder`, where it finds this checkout."""
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
