"""The bundles that a server runs: one folder, or whatever bundles a folder holds while the server runs."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.errors import BundleError
from pipeline.runtime.bundle import MANIFEST, Bundle
from pipeline.runtime.edge import EdgeHalf


class Shelf:
    """The bundle in the folder `path`, or those in its subfolders, which may come and go and be replaced.

    One that cannot be served is reported once on standard error and passed over. One that is gone is served until it was missed twice, as a folder
    that is being replaced is away for a moment.
    """

    def __init__(self, path: Path, threads: int = 1, slowdown: float = 1.0) -> None:
        self.path, self.threads, self.slowdown = path, threads, slowdown
        self._known: dict[Path, tuple[int, bytes | None]] = {}  # when its manifest was written, and its id if it can be served
        self._missed: set[Path] = set()

    def first(self) -> list[EdgeHalf]:
        """What is there to begin with.

        Raises:
            CoinferError: `path` is no bundle that can be served, or holds none.
        """
        if self._is_one:
            half = EdgeHalf(Bundle.load(self.path), self.threads, self.slowdown)
            self._known[self.path] = _written(self.path) or 0, half.bundle_id
            return [half]
        came, _ = self.look()
        if not came:
            raise BundleError(f"{self.path} holds no bundle that can be served; give a bundle, or a folder of bundles, as `coinfer export` writes them.")
        return came

    def look(self) -> tuple[list[EdgeHalf], set[bytes]]:
        """Halves that came since the last look, and the ids of all bundles to serve from now on."""
        there = {path: written for path in self._places() if (written := _written(path)) is not None}
        gone = self._known.keys() - there.keys()
        for path in gone & self._missed:
            del self._known[path]
        self._missed = gone
        came = []
        for path, written in sorted(there.items()):
            if path in self._known and self._known[path][0] == written:
                continue
            try:
                half = EdgeHalf(Bundle.load(path), self.threads, self.slowdown)
            except Exception as error:  # ONNX Runtime raises its own unrelated classes
                print(f"coinfer: not served: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                self._known[path] = written, None
                continue
            self._known[path] = written, half.bundle_id
            came.append(half)
        return came, {bundle_id for _, bundle_id in self._known.values() if bundle_id is not None}

    @property
    def _is_one(self) -> bool:
        return (self.path / MANIFEST).exists() or not self.path.is_dir()

    def _places(self) -> list[Path]:
        if self.path in self._known:
            return [self.path]
        try:
            return [path for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")]
        except OSError:
            return []


def _written(path: Path) -> int | None:
    try:
        return (path / MANIFEST).stat().st_mtime_ns
    except OSError:
        return None
