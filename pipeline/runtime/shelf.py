"""The bundles that a server runs: one folder, or whatever bundles a folder holds while the server runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import BundleError, CoinferError
from pipeline.runtime.bundle import MANIFEST, Bundle
from pipeline.runtime.edge import EdgeHalf

Fingerprint = tuple[tuple[str, int, int, int], ...]


class Shelf:
    """The bundle in the folder `path`, or those in its subfolders, which may come and go and be replaced.

    One that cannot be served is reported on standard error and looked at again when its files change; what its folder held before is served meanwhile.
    A subfolder that is gone is served until it was missed twice, as one that is being replaced is away for a moment; a single bundle always.

    Args:
        check: raises BundleError of a bundle that must not be served, though it is whole.
    """

    def __init__(self, path: Path, threads: int = 1, slowdown: float = 1.0, check: Callable[[Bundle], object] = lambda bundle: None) -> None:
        self.path, self.threads, self.slowdown, self._check = path, threads, slowdown, check
        self._is_one = (path / MANIFEST).exists() or not path.is_dir()
        self._seen: dict[Path, Fingerprint] = {}  # as its files were when last looked at
        self._served: dict[Path, bytes] = {}
        self._missed: set[Path] = set()

    def first(self) -> list[EdgeHalf]:
        """What is there to begin with.

        Raises:
            CoinferError: `path` is no bundle that can be served, or holds none.
        """
        if self._is_one:
            return [self._open(self.path)]
        came, _ = self.look()
        if not came:
            raise BundleError(f"{self.path} holds no bundle that can be served; give a bundle, or a folder of bundles, as `coinfer export` writes them.")
        return came

    def look(self) -> tuple[list[EdgeHalf], set[bytes]]:
        """Halves that came since the last look, and the ids of all bundles to serve from now on."""
        came = []
        try:
            places = [self.path] if self._is_one else [path for path in self.path.iterdir() if not path.name.startswith(".")]
            there = {path: found for path in places if (found := _fingerprint(path)) is not None}
        except OSError as error:
            self._report(f"{self.path} cannot be looked at ({error}); what was there is served on.")
            return [], set(self._served.values())
        for path in sorted(there):
            if self._seen.get(path) != there[path]:
                try:
                    came.append(self._open(path))
                except CoinferError as error:
                    self._report(str(error))
                except Exception as error:  # ONNX Runtime raises its own unrelated classes
                    self._report(f"{path} cannot be opened ({error!r}); export the bundle again.")
                self._seen[path] = there[path]
        if not self._is_one:
            gone = (self._seen.keys() | self._served.keys()) - there.keys()
            for path in gone & self._missed:
                self._seen.pop(path, None)
                self._served.pop(path, None)
            self._missed = gone
        return came, set(self._served.values())

    def _open(self, path: Path) -> EdgeHalf:
        found = _fingerprint(path)
        bundle = Bundle.load(path)
        self._check(bundle)
        half = EdgeHalf(bundle, self.threads, self.slowdown)
        self._served[path] = half.bundle_id
        if found is not None:
            self._seen[path] = found
        return half

    def _report(self, reason: str) -> None:
        print(f"coinfer: not served: {reason}", file=sys.stderr, flush=True)


def _fingerprint(path: Path) -> Fingerprint | None:
    """Names, sizes, times and places of a bundle's files; None where there is no bundle."""
    try:
        files = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    except (FileNotFoundError, NotADirectoryError):
        return None
    if MANIFEST not in {name for name, _ in files}:
        return None
    return tuple((name, known.st_size, known.st_mtime_ns, known.st_ino) for name, known in files)
