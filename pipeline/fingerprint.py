"""What kept state, a study or a checkpoint, stands on besides data and parameters: the code that made it and the libraries it ran on."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
import pipeline

LIBRARIES = ("torch", "lightning", "optuna", "numpy", "pillow", "torch-pruning")
TRAINING_CODE = ("models/*.py", "pipeline/data.py", "pipeline/distilling.py", "pipeline/inference.py", "pipeline/losses.py", "pipeline/training.py")


def fingerprint(code: Sequence[str], backbone: str) -> dict[str, Any]:
    """Hashes of our files that `code` names (patterns such as `models/*.py`) and of the package of a user's own `backbone`; library versions.

    A user's package is no dep of any stage, so nothing else would notice that it changed.
    """
    parents = {package.__name__: Path(package.__path__[0]).parent for package in (models, pipeline)}
    ours = [(file.relative_to(parent), file) for pattern in code for parent in [parents[pattern.split("/")[0]]] for file in parent.glob(pattern)]
    files = {name.as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for name, file in sorted([*ours, *_own(backbone)])}
    return {"files": files, "versions": {name: version(name) for name in LIBRARIES}}


def _own(backbone: str) -> Iterator[tuple[Path, Path]]:
    package, colon, _ = backbone.partition(":")
    if not colon:
        return
    try:
        spec = importlib.util.find_spec(package.split(".")[0])
    except (ImportError, ValueError):
        return  # building it says so better
    if spec is None:
        return
    for folder in map(Path, spec.submodule_search_locations or ()):
        yield from ((file.relative_to(folder.parent), file) for file in folder.rglob("*.py"))
    if spec.origin is not None and not spec.submodule_search_locations:
        yield Path(Path(spec.origin).name), Path(spec.origin)
