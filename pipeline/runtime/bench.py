"""Timing on the device that this runs on: ONNX models, kernel by kernel too, image codecs, preprocessing and the entropy coder, in interleaved rounds.

Needs the light runtime only. `LocalBench` does it here; `pipeline.costs.remote_bench` has `bench_server` do it elsewhere.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ProfileError
from pipeline.machine import cpu_name
from pipeline.runtime import coder
from pipeline.runtime.bundle import open_session, session_options
from pipeline.runtime.context import fit_contexts
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.images import FORMATS, Format, encode_image, open_encoded
from pipeline.runtime.preprocess import Preprocessing

BOARD = Path("/proc/device-tree/model")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
CODER_BITS = 4
CODER_CHANNELS, CODER_IMAGES = 16, 64
LEAST_MS = 1e-4  # ONNX Runtime's profile counts whole microseconds, and calls 0 what takes less than one
LEAST_CALLS = 2
MAX_IMAGE_SIZE, MAX_SYMBOLS, MAX_CALLS = 2048, 1 << 16, 10_000
SMALL_BYTES = 1024  # constants above this do not come back with an optimised model
NUMBERS = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


@dataclass(frozen=True)
class Repeats:
    """How often each job runs: each of `rounds` visits every job in random order, so that a slow moment touches all alike, and there calls it
    `warmup` times untimed, then `repeats` times timed, but no longer than `job_ms` (two calls at least)."""

    threads: int
    rounds: int
    repeats: int
    warmup: int
    job_ms: float

    def __post_init__(self) -> None:
        whole = (self.threads, self.rounds, self.repeats, self.warmup)
        good = all(type(number) is int for number in whole) and min(whole[:3]) >= 1 and self.warmup >= 0 and self.threads <= 1024
        if not good or self.rounds * (self.repeats + self.warmup) > MAX_CALLS or not (0 < float(self.job_ms) < math.inf):
            raise ProfileError(
                f"jobs cannot be repeated by {vars(self)}: give whole numbers, threads, rounds and repeats 1 or more, "
                f"at most {MAX_CALLS} calls of a job, and job_ms above 0."
            )


@dataclass(frozen=True)
class ModelWork:
    """A call of an ONNX model on one example, with random numbers for its inputs; timed as it is and, beside, kernel by kernel."""

    model: bytes


@dataclass(frozen=True)
class ImageWork:
    """`preprocess` uint8 pixels, or `encode` them, or `decode` the file, `size` x `size`; format and quality mean nothing to `preprocess`."""

    work: Literal["preprocess", "encode", "decode"]
    size: int
    image_format: Format = "webp"
    quality: int = 100

    def __post_init__(self) -> None:
        known = self.work in ("preprocess", "encode", "decode") and self.image_format in FORMATS
        if not known or not (1 <= self.size <= MAX_IMAGE_SIZE and 1 <= self.quality <= 100):
            raise ProfileError(
                f"there is no image work {vars(self)}; sizes go up to {MAX_IMAGE_SIZE}, qualities from 1 to 100, formats are {', '.join(FORMATS)}."
            )


@dataclass(frozen=True)
class CoderWork:
    """The entropy coder with framing: `encode` or `decode` so many symbols."""

    work: Literal["encode", "decode"]
    symbols: int

    def __post_init__(self) -> None:
        if self.work not in ("encode", "decode") or not 1 <= self.symbols <= MAX_SYMBOLS:
            raise ProfileError(f"there is no coder work {vars(self)}; it codes 1 to {MAX_SYMBOLS} symbols.")


Work = ModelWork | ImageWork | CoderWork


@dataclass(frozen=True)
class Samples:
    """The times of one job, in ms. Of a model also what ONNX Runtime made of it, without its larger constants, and the events of one profiled call, each
    lasting as long (in microseconds) as the middle half of all its calls did on average."""

    ms: tuple[float, ...]
    optimised: bytes = b""
    events: tuple[Mapping[str, Any], ...] = ()


class Bench(Protocol):
    """Where jobs are timed: on this machine or on another, at `address`."""

    address: str

    def describe(self) -> dict[str, Any]:
        """`machine` (cpu, os, arch; board and governor where they can be read), `runtime` and `coder` (c or python)."""
        ...

    def measure(self, jobs: Sequence[Work], repeats: Repeats, beside: bytes | None = None) -> list[Samples]:
        """Time `jobs`; each call of one that is no model comes right after one of the model `beside`, which leaves the caches as they are in use.

        Raises:
            ProfileError: a model that ONNX Runtime cannot run there, or an image format that Pillow lacks.
        """
        ...


class LocalBench:
    """Times on this machine."""

    address = ""

    def describe(self) -> dict[str, Any]:
        machine = {"cpu": cpu_name(), "os": platform.system(), "arch": platform.machine()}
        with suppress(OSError):  # on Arm: boards of one processor differ in memory, clocks and cooling
            machine["board"] = BOARD.read_text(errors="replace").strip("\0\n ")
        with suppress(OSError):  # virtual machines and other systems have no such file
            machine["governor"] = GOVERNOR.read_text().strip()
        return {"machine": machine, "runtime": f"onnxruntime {ort.__version__}", "coder": "c" if coder.HAVE_C else "python"}

    def measure(self, jobs: Sequence[Work], repeats: Repeats, beside: bytes | None = None) -> list[Samples]:
        try:
            with ExitStack() as stack:
                calls = [_call(job, repeats.threads, stack) for job in jobs]
                before = _model_call(beside, repeats.threads) if beside else _nothing
                times: list[list[float]] = [[] for _ in jobs]
                random = np.random.default_rng(0)
                gc.collect()
                gc.disable()  # a collection would land on whichever call is running
                try:
                    for _ in range(repeats.rounds):
                        for index in random.permutation(len(jobs)):
                            call = calls[index]
                            first = _nothing if call.profiled else before
                            times[index] += _timed(call.plain, first, repeats)
                            if call.profiled:
                                _timed(call.profiled, _nothing, repeats)
                finally:
                    gc.enable()
                return [Samples(tuple(ms), *(call.result() if call.result else ())) for call, ms in zip(calls, times, strict=True)]
        except ProfileError:
            raise
        except Exception as error:  # ONNX Runtime and Pillow raise many unrelated kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ProfileError(f"a job cannot be measured on this machine: {reason}; check its versions of onnxruntime and Pillow.") from error


@dataclass(frozen=True)
class _Call:
    plain: Callable[[], object]
    profiled: Callable[[], object] | None = None
    result: Callable[[], tuple[bytes, tuple[Mapping[str, Any], ...]]] | None = None


def _nothing() -> None:
    pass


def _timed(call: Callable[[], object], before: Callable[[], object], repeats: Repeats) -> list[float]:
    for _ in range(repeats.warmup):
        call()
    found: list[float] = []
    begin = perf_counter_ns()
    while len(found) < repeats.repeats and (len(found) < LEAST_CALLS or perf_counter_ns() - begin < 1e6 * repeats.job_ms):
        before()
        start = perf_counter_ns()
        call()
        found.append((perf_counter_ns() - start) / 1e6)
    return found


def _call(job: Work, threads: int, stack: ExitStack) -> _Call:
    if isinstance(job, ModelWork):
        return _profiled(job.model, threads, stack)
    return _Call(_image_call(job) if isinstance(job, ImageWork) else _coder_call(job))


def _model_call(model: bytes, threads: int) -> Callable[[], object]:
    return _on_random(open_session(model, threads))


def _on_random(session: ort.InferenceSession) -> Callable[[], object]:
    random, feeds = np.random.default_rng(0), {}
    for item in session.get_inputs():
        if item.type not in NUMBERS:
            raise ProfileError(f"input {item.name} of a model to measure is a {item.type}; only {', '.join(NUMBERS)} can be made up.")
        shape = [side if isinstance(side, int) else 1 for side in item.shape]
        numbers = random.standard_normal(shape) if "float" in item.type or "double" in item.type else random.integers(0, 4, shape)
        feeds[item.name] = numbers.astype(NUMBERS[item.type])
    return lambda: session.run(None, feeds)


def _profiled(model: bytes, threads: int, stack: ExitStack) -> _Call:
    """`model` in two sessions: as it is deployed, and with ONNX Runtime's profiler, which slows every kernel a little."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coinfer-bench-")))
    options = session_options(threads)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "constants")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(SMALL_BYTES))
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    ended: list[str] = []
    stack.callback(lambda: ended or session.end_profiling())

    def result() -> tuple[bytes, tuple[Mapping[str, Any], ...]]:
        ended.append(session.end_profiling())
        return (folder / "optimised.onnx").read_bytes(), _one_call(json.loads(Path(ended[0]).read_text()))

    return _Call(_model_call(model, threads), _on_random(session), result)


def _one_call(events: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Of every node's events the first, lasting as long as the middle half of them on average: finer than a median of whole microseconds."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node":
            by_name.setdefault(event["name"], []).append(event)

    def middle(same: Sequence[Mapping[str, Any]]) -> float:
        durations = np.sort([float(event["dur"]) for event in same])
        return max(float(durations[len(durations) // 4 : len(durations) - len(durations) // 4].mean()), 1e3 * LEAST_MS)

    return tuple(
        {**same[0], "args": {key: value for key, value in same[0].get("args", {}).items() if not key.startswith("mem")}, "dur": round(middle(same), 3)}
        for same in by_name.values()
    )


def _image_call(job: ImageWork) -> Callable[[], object]:
    preprocessing = Preprocessing(job.size)
    pixels = preprocessing.pixels(Image.fromarray(_photo(job.size)))
    if job.work == "preprocess":
        return lambda: preprocessing.tensor(pixels[None])
    if job.work == "encode":
        return partial(encode_image, pixels, job.image_format, job.quality)
    data = encode_image(pixels, job.image_format, job.quality)
    return lambda: preprocessing.pixels(open_encoded(data, job.image_format, job.quality))


def _coder_call(job: CoderWork) -> Callable[[], object]:
    """Symbols as unevenly spread as features', by tables with contexts."""
    channels = math.gcd(job.symbols, CODER_CHANNELS)
    height = next(side for side in range(math.isqrt(job.symbols // channels), 0, -1) if job.symbols // channels % side == 0)
    shape = CODER_IMAGES, channels, height, job.symbols // channels // height
    known = np.minimum(np.random.default_rng(0).geometric(0.3, shape) - 1, 2**CODER_BITS - 1).astype(np.uint8)
    tables, symbols = coder.build_tables(known, CODER_BITS, fit_contexts(known)), known[0]

    def encode() -> bytes:
        return pack(coder.encode(symbols, tables), b"\0\0\0\0", Kind.SYMBOLS)

    frame = encode()
    return encode if job.work == "encode" else lambda: coder.decode(unpack(frame).payload, symbols.shape, tables)


def _photo(image_size: int) -> NDArray[np.uint8]:
    """A smooth scene with grain, uint8 (S, S, 3): an image codec's work depends on content, and neither noise nor a flat field is like a photograph."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse, np.float32) + random.normal(0, 6, (image_size, image_size, 3)), 0, 255).astype(np.uint8)
