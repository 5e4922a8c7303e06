"""The ways to classify an image on device and edge, each through real processes: what an evaluation compares."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from pipeline.costs.link import Link
from pipeline.runtime.bundle import DEVICE_ONLY, EDGE, Bundle, write_bundle
from pipeline.runtime.device import Answer, DeviceHalf
from pipeline.runtime.server import edge_process
from pipeline.runtime.transport import TcpTransport

Pixels = NDArray[np.uint8]
Ways = dict[str, Callable[[Pixels], Answer]]
Served = Mapping[str, tuple[Bundle, int]]
MODES = ("split", "device_only", "edge_only")


@contextmanager
def edges(bundle: Bundle, reference: Path, edge_only: Mapping[str, Any], threads: int, slowdown: float) -> Iterator[Served]:
    """An edge process each for `split` (if `bundle` is one) and `edge_only`, with their bundles and ports on 127.0.0.1; ended however the block ends.

    Unless `bundle` is edge-only itself, that way gets a bundle of its own: the candidate `edge_only`, and on the edge the ONNX file `reference`.

    Raises:
        CoinferError: an edge process did not start, or there is no space for the temporary bundle.
    """
    with ExitStack() as stack:
        bundles = {bundle.kind.replace("-", "_"): bundle}
        if "edge_only" not in bundles:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coinfer-")))
            whole = reference.read_bytes()
            bundles["edge_only"] = write_bundle(
                folder / "edge-only",
                kind="edge-only",
                candidate=edge_only,
                plan={},
                preprocessing=bundle.preprocessing,
                classes=bundle.classes,
                files={EDGE: whole, DEVICE_ONLY: whole},
                points=(),
                extra={},
            )
        bundles.pop("device_only", None)
        yield {mode: (each, stack.enter_context(edge_process(each, threads, slowdown))) for mode, each in bundles.items()}


@contextmanager
def ways(bundle: Bundle, served: Served, threads: int, link: Link | None = None, slowdown: float = 1, point: int = 0) -> Iterator[Ways]:
    """`MODES` -> a function that classifies pixels, uint8 (3, S, S), that way; `link` and the device's `slowdown` are emulated.

    `point` is the operating point of a split.
    """
    with ExitStack() as stack:

        def over(its_bundle: Bundle, port: int) -> Callable[[Pixels], Answer]:
            half = DeviceHalf(its_bundle, threads, slowdown, point if its_bundle is bundle else 0)
            transport = stack.enter_context(closing(TcpTransport("127.0.0.1", port, link)))
            return lambda pixels: half.classify(pixels, transport)

        found: Ways = {"device_only": DeviceHalf(bundle, threads, slowdown).classify_locally, **{mode: over(*pair) for mode, pair in served.items()}}
        yield {mode: found[mode] for mode in MODES if mode in found}


def ask(every: Ways, images: Pixels, title: str | None = None) -> dict[str, list[Answer]]:
    """What every way answers to every one of `images`, uint8 (N, 3, S, S); the ways take turns, so that noise falls on all of them.

    With a `title` and on a terminal a progress bar is shown.
    """
    answers: dict[str, list[Answer]] = {mode: [] for mode in every}
    quiet = title is None or not sys.stderr.isatty()
    for pixels in track(images, title or "", console=Console(stderr=True), transient=True, disable=quiet, refresh_per_second=2):
        for mode, classify in every.items():
            answers[mode].append(classify(pixels))
    return answers
