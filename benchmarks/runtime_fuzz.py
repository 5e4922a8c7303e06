"""Hostile inputs to frame, TCP stream, reply, coder and bundle loader, each target in a process of its own, so that a crash is counted and its input kept.

`python benchmarks/runtime_fuzz.py --inputs 1000000 --seed 0 --out FILE` writes what `measure` gives; other seeds are other inputs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fuzz_targets import TARGETS
from benchmarks.results_file import figure
from pipeline.files import atomic_write_json

HANG_S = 10.0
POLL_S = 0.1
START_TIMEOUT_S = 120.0
MOST_INPUT_BYTES = 1 << 21
MOST_GROWTH_BYTES = 256 << 20  # of a process's largest memory over what it had before the first input
MOST_ADDRESSES_BYTES = 2 << 30  # more than that: an allocation beyond it fails, and so does the input
MOST_FAILURES = 20  # kept of one target; counted are all
ASKED = ("frame", "stream", "loader")
COUNTS = ("inputs", "checked", "answered", "refused")

_CONTEXT = multiprocessing.get_context("spawn")


class _Shared(ctypes.Structure):
    """What outlives a crash: counts, and the input of the moment."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in COUNTS),
        ("index", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("begin_bytes", ctypes.c_int64),
        ("most_bytes", ctypes.c_int64),
        ("data", ctypes.c_ubyte * MOST_INPUT_BYTES),
    )

    def put(self, data: bytes) -> None:
        self.length = len(data)
        ctypes.memmove(self.data, data, len(data))

    def taken(self) -> bytes:
        return bytes(self.data[: self.length])


def measure(inputs: int, seed: int, targets: dict[str, Any] | None = None, hang_s: float = HANG_S) -> dict[str, Any]:
    """Give `inputs` inputs, a function of `seed`, to all targets in their shares, one target after another.

    Returns {"seed", "inputs", "checked" (changed frames and bundles whose checksum or hashes fit), "failures" (how many), "targets": {name: {"inputs",
    "checked", "answered", "refused", "seconds", "growth_mb", "failures", "kept": [{"index", "what", "input" (base64)}]}}}.
    """
    found = {name: _fuzzed(name, make, round(inputs * share), seed, hang_s) for name, (make, share) in (targets or TARGETS).items()}
    sums = {key: sum(each[key] for each in found.values()) for key in ("inputs", "checked", "failures")}
    return {"seed": seed, **sums, "targets": found}


def figures(raw: dict[str, Any]) -> dict[str, Any]:
    """Of frame, TCP stream and loader, which the issue asks for; what the others did is in the text."""
    asked, others = (
        {key: sum(each[key] for name, each in raw["targets"].items() if (name in ASKED) is within) for key in ("inputs", "checked", "failures")}
        for within in (True, False)
    )
    how = (
        f"frames, TCP streams and {raw['targets']['loader']['inputs']:,} bundles, {asked['checked']:,} of them changed and given checksums or hashes that fit; "
        f"beside them {others['inputs']:,} replies and payloads of the coder with {others['failures']} failures"
    )
    found = {"fuzz_inputs": figure(asked["inputs"], "inputs", how, n=asked["inputs"])}
    how = f"crashes, hangs of {HANG_S:g} s, memory beyond {MOST_GROWTH_BYTES >> 20} MiB, wrong answers and exceptions without a sentence"
    return found | {"fuzz_failures": figure(asked["failures"], "inputs", how, n=asked["inputs"])}


def input_of(name: str, seed: int, index: int, target: Any) -> tuple[bytes, bool]:
    """What `measure` gives as input `index` to `target`, which is called `name`."""
    return target.generate(random.Random(f"{seed}/{name}/{index}"))


def _fuzzed(name: str, make: Any, count: int, seed: int, hang_s: float) -> dict[str, Any]:
    shared = _CONTEXT.RawValue(_Shared)
    failures: list[dict[str, Any]] = []
    growth, start_s = 0, time.monotonic()
    while shared.index < count:
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        shared.begin_bytes = 0
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        process = _CONTEXT.Process(target=_work, args=(name, make, count, seed, shared, theirs, folder))
        process.start()
        theirs.close()
        reason = _watch(process, shared, ours, failures, hang_s)
        if reason:
            failures.append({"index": int(shared.index), "what": reason, "input": base64.b64encode(shared.taken()).decode()})
            shared.inputs += 1
            shared.index += 1
        growth = max(growth, shared.most_bytes - shared.begin_bytes)
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - start_s, 1)
    counts = {key: int(getattr(shared, key)) for key in COUNTS}
    return {**counts, "seconds": seconds, "growth_mb": round(growth / (1 << 20), 1), "failures": len(failures), "kept": failures[:MOST_FAILURES]}


def _watch(process: Any, shared: Any, ours: Connection, failures: list[dict[str, Any]], hang_s: float) -> str:
    """Take in what fails until the process ends by itself, or is ended as it hangs: what became of it, empty if nothing."""
    place, since_s = (-1, False), time.monotonic()
    with ours:
        while True:
            try:
                while ours.poll(POLL_S):
                    failures.append(ours.recv())
            except EOFError:
                process.join()
                if not shared.begin_bytes:
                    raise RuntimeError("a target did not start; what it said is above") from None
                return "" if process.exitcode == 0 else f"the process ended with {process.exitcode}"
            if (now := (int(shared.index), bool(shared.begin_bytes))) != place:
                place, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > (hang_s if place[1] else START_TIMEOUT_S):
                process.kill()
                process.join()
                if not place[1]:
                    raise TimeoutError(f"a target did not start within {START_TIMEOUT_S:g} s")
                return f"hangs for {hang_s:g} s"


def _work(name: str, make: Any, count: int, seed: int, shared: Any, theirs: Connection, folder: Path) -> None:
    with (folder / "log").open("wb") as log:
        os.dup2(log.fileno(), 2)  # ONNX Runtime reports there what it also raises
    target = make(folder)
    status = os.open("/proc/self/status", os.O_RDONLY)
    shared.begin_bytes = shared.most_bytes = _peak_bytes(status)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MOST_ADDRESSES_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    while shared.index < count:
        data, checked = input_of(name, seed, shared.index, target)
        shared.put(data)
        shared.checked += checked
        what = ""
        try:
            outcome = target.check(data)
            setattr(shared, outcome, getattr(shared, outcome) + 1)
        except Exception as error:
            what = _told(error)
        if (peak := _peak_bytes(status)) > shared.most_bytes:
            if not what and peak - shared.most_bytes > MOST_GROWTH_BYTES:
                what = f"takes {(peak - shared.most_bytes) >> 20} MiB"
            shared.most_bytes = peak
        if what:
            theirs.send({"index": int(shared.index), "what": what, "input": base64.b64encode(data).decode()})
        shared.inputs += 1
        shared.index += 1
    with contextlib.suppress(Exception):
        target.close()
    theirs.close()


def _told(error: Exception) -> str:
    place = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__)[-4:]))
    return f"{type(error).__name__}: {str(error)[:200]} ({place})"


def _peak_bytes(status: int) -> int:
    """Largest memory so far, from /proc/self/status; what getrusage says takes the parent's memory at the fork for the child's."""
    return int(os.pread(status, 4096, 0).partition(b"VmHWM:")[2].split(None, 1)[0]) << 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raw = measure(arguments.inputs, arguments.seed)
    if arguments.out:
        atomic_write_json(arguments.out, raw)
    for name, found in raw["targets"].items():
        rate = found["inputs"] / max(found["seconds"], 1e-9)
        print(f"{name:7} " + ", ".join(f"{found[key]} {key}" for key in (*COUNTS, "failures")) + f", {rate:.0f}/s, {found['growth_mb']} MB more")
        for failure in found["kept"]:
            print(f"  {failure['index']}: {failure['what']}")
