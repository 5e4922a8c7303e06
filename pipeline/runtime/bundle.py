"""The unit of release: the ONNX halves, the codec tables and a manifest that knows every hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.errors import BundleError
from pipeline.files import atomic_directory
from pipeline.runtime.coder import MAX_SLOTS, CodecTables
from pipeline.runtime.frame import BUNDLE_ID_BYTES
from pipeline.runtime.images import FORMATS, Format
from pipeline.runtime.preprocess import Preprocessing

SCHEMA_VERSION = 3
MAX_POINTS = 256  # a byte of the payload says which
MAX_SYMBOLS = 1 << 26  # of an image: the edge has room for as many before it has looked at a payload
MANIFEST = "manifest.json"
DEVICE = "device.onnx"  # float32 images -> uint8 symbols
EDGE = "edge.onnx"  # uint8 symbols (edge-only: float32 images) -> logits
DEVICE_ONLY = "device-only.onnx"  # float32 images -> logits
CODEC = "codec.json"
FILES = {"split": (DEVICE, EDGE, DEVICE_ONLY, CODEC), "edge-only": (EDGE, DEVICE_ONLY), "device-only": (DEVICE_ONLY,)}


def session_options(threads: int) -> ort.SessionOptions:
    """How sessions run on device and edge: `threads` intra-op threads, node after node, silent below errors.

    Idle threads do not spin: device and edge often share a machine, where spinning takes the other's core.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(model: Path | bytes, threads: int) -> ort.InferenceSession:
    """An ONNX Runtime CPU session with the options of `session_options`."""
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), session_options(threads), providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder; make one with `Bundle.load` or `write_bundle`."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Open the bundle in `path` after checking every byte of it.

        Raises:
            BundleError: a file is missing, altered, or belongs to another bundle; the message names it.
        """
        bundle = cls.without_models(path)
        for name in bundle.manifest["sha256"]:
            bundle.read(name)
        for point in bundle.points if bundle.kind == "split" else ():
            if not point.fit(bundle.code_shape):
                raise BundleError(f"{path / CODEC} has {point.takes} where {DEVICE} gives {bundle.code_shape}; export the bundle again.")
        return bundle

    @classmethod
    def without_models(cls, path: Path) -> Bundle:
        """The bundle in `path`, of which only the manifest has to be there, and the codec tables where `points` is asked for.

        Raises:
            BundleError: the manifest is missing or altered.
        """
        return cls(path, _read_manifest(path / MANIFEST))

    def read(self, name: str) -> bytes:
        """The bytes of the file called `name`, checked against the manifest at every read: the folder may have been replaced since it was loaded.

        Raises:
            BundleError: the file is missing or altered.
        """
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise BundleError(f"{self.path / name} cannot be read ({error.strerror}); the bundle is incomplete, export or fetch it again.") from error
        if hashlib.sha256(data).hexdigest() != self.manifest["sha256"][name]:
            raise BundleError(
                f"{self.path / name} is not the file this bundle was written with; it is altered or from another bundle, export or fetch it again."
            )
        return data

    @property
    def kind(self) -> str:
        """`split`, `edge-only` or `device-only`."""
        return str(self.manifest["kind"])

    @property
    def bundle_id(self) -> bytes:
        """The 4 bytes every frame between this bundle's halves carries."""
        return bytes.fromhex(self.manifest["bundle_id"])[:BUNDLE_ID_BYTES]

    @property
    def classes(self) -> list[str]:
        return list(self.manifest["classes"])

    @property
    def quality(self) -> int:
        """Image quality an edge-only device sends at; 100 is lossless."""
        return int(self.manifest["candidate"]["quality"])

    @property
    def image_format(self) -> Format:
        """What an edge-only device sends images as.

        Raises:
            BundleError: a format that this version does not know.
        """
        name: Format = self.manifest["candidate"].get("image_format", "webp")  # bundles written before there was a choice name none
        if name not in FORMATS:
            raise BundleError(f"{self.path} sends images as {name}, this version knows {', '.join(FORMATS)}; export the bundle again.")
        return name

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Shape (h, H, W) of the symbols of one image."""
        channels, height, width = self.manifest["shapes"][EDGE]["input"]
        return channels, height, width

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.from_dict(self.manifest["preprocessing"])

    @cached_property
    def points(self) -> tuple[CodecTables, ...]:
        """The coder's tables of each operating point, the most expensive first; most codecs have one."""
        try:
            fields = json.loads(self.read(CODEC))
        except (ValueError, RecursionError):
            fields = None
        found = fields.get("points") if isinstance(fields, dict) else None
        if not isinstance(found, list) or not 1 <= len(found) <= MAX_POINTS:
            raise BundleError(f"{self.path / CODEC} names no operating points; export the bundle again.")
        points = tuple(CodecTables.from_dict(point) for point in found)
        if sum(len(point.freqs) << point.precision for point in points) > MAX_SLOTS:
            raise BundleError(f"{self.path / CODEC} has too many tables for {len(points)} operating points; export the bundle again with fewer.")
        return points

    def session(self, name: str, threads: int) -> ort.InferenceSession:
        """An ONNX Runtime session of the file called `name`.

        Raises:
            BundleError: this kind of bundle has no such file, it was altered, cannot be run, or is not what the manifest says.
        """
        if name not in self.manifest["sha256"]:
            raise BundleError(f"{self.path} is {_an(self.kind)} bundle and has no {name}; use a bundle of another kind.")
        session = _opened(str(self.path / name), self.read(name), threads)
        if (found := _shapes(str(self.path / name), session)) != self.manifest["shapes"][name]:
            raise BundleError(f"{self.path / name} maps {found['input']} to {found['output']}, unlike its manifest says; export the bundle again.")
        wanted = tuple(f"tensor({'uint8' if integers else 'float'})" for integers in (name == EDGE and self.kind == "split", name == DEVICE))
        if (types := (session.get_inputs()[0].type, session.get_outputs()[0].type)) != wanted:
            raise BundleError(f"{self.path / name} maps a {types[0]} to a {types[1]} where a {wanted[0]} becomes a {wanted[1]}; export the bundle again.")
        return session


def write_bundle(
    out: Path,
    *,
    kind: str,
    candidate: Mapping[str, Any],
    plan: Mapping[str, Any],
    preprocessing: Preprocessing,
    classes: Sequence[str],
    files: Mapping[str, bytes],
    points: Sequence[CodecTables],
    extra: Mapping[str, Any],
) -> Bundle:
    """Write a bundle folder to `out`, whole or not at all, and load it back.

    `files` holds the ONNX files of `kind` (`FILES`) by name, `points` the coder's tables of a split's operating points,
    `extra` what else the manifest should say (cut, opset, versions), by key.

    Raises:
        BundleError: files or tables that do not make a bundle of this kind, or halves that do not fit each other.
        CoinferError: `out` cannot be written.
    """
    contents = dict(files)
    if points:
        contents[CODEC] = (json.dumps({"points": [point.to_dict() for point in points]}, separators=(",", ":"), sort_keys=True) + "\n").encode()
    if set(contents) != set(FILES[kind]):
        raise BundleError(f"{out}: {_an(kind)} bundle holds {', '.join(FILES[kind])}, not {', '.join(sorted(contents)) or 'nothing'}; give exactly those.")
    shapes = {name: _shapes(name, _opened(name, data, 1)) for name, data in sorted(files.items())}
    _check_fit(out, shapes, preprocessing, len(classes), points)
    manifest: dict[str, Any] = {
        **extra,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "candidate": dict(candidate),
        "plan": dict(plan),
        "preprocessing": preprocessing.to_dict(),
        "classes": list(classes),
        "shapes": shapes,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())},
    }
    manifest["bundle_id"] = hashlib.sha256(_json(manifest)).hexdigest()
    with atomic_directory(out) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_bytes(_json(manifest))
    return Bundle.load(out)


def _an(kind: str) -> str:
    return f"{'an' if kind == 'edge-only' else 'a'} {kind}"


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); point at a folder that `export` wrote, or export or fetch the bundle again.") from error
    try:
        manifest: dict[str, Any] = json.loads(data)
        bundle_id = manifest["bundle_id"]
        rest = {key: value for key, value in manifest.items() if key != "bundle_id"}
        intact = data == _json(manifest) and hashlib.sha256(_json(rest)).hexdigest() == bundle_id
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise BundleError(f"{path} is not as it was written; export or fetch the bundle again.")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(f"{path} is of schema {manifest.get('schema_version')}, this version reads {SCHEMA_VERSION}; export the bundle again.")
    if wrong := _faults(manifest):
        raise BundleError(f"{path} has no usable {', '.join(wrong)}; export the bundle again.")
    if set(manifest["sha256"]) != set(FILES[manifest["kind"]]):
        raise BundleError(f"{path} lists other files than {_an(manifest['kind'])} bundle has; export the bundle again.")
    _check_fit(path.parent, manifest["shapes"], Preprocessing.from_dict(manifest["preprocessing"]), len(manifest["classes"]), ())
    return manifest


def _faults(manifest: Mapping[str, Any]) -> list[str]:
    """Which of the entries that device and edge read are missing or of the wrong kind. Hashes only say that they are as they were written."""
    kind, shapes, candidate = (manifest.get(name) for name in ("kind", "shapes", "candidate"))
    known = isinstance(kind, str) and kind in FILES
    models = [name for name in FILES[str(kind)] if name != CODEC] if known else []
    good = {
        "kind": known,
        "sha256": isinstance(manifest.get("sha256"), dict),
        "preprocessing": isinstance(manifest.get("preprocessing"), dict),
        "classes": _is_list(manifest.get("classes"), str),
        "shapes": isinstance(shapes, dict) and set(shapes) == set(models) and all(_is_shape(shape) for shape in shapes.values()),
        "candidate": isinstance(candidate, dict) and (kind != "edge-only" or (type(candidate.get("quality")) is int and 1 <= candidate["quality"] <= 100)),
    }
    return [name for name, is_good in good.items() if not is_good]


def _is_shape(shape: Any) -> bool:
    ends = [shape.get(end) for end in ("input", "output")] if isinstance(shape, dict) else [None]
    return all(_is_list(end, int) and min(end) >= 1 and math.prod(end) <= MAX_SYMBOLS for end in ends)


def _is_list(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and bool(value) and all(type(each) is kind for each in value)


def _opened(name: str, model: bytes, threads: int) -> ort.InferenceSession:
    try:
        return open_session(model, threads)
    except Exception as error:  # ONNX Runtime raises its own unrelated classes
        raise BundleError(f"{name} cannot be run by ONNX Runtime ({_first_line(error)}); export it again.") from error


def run_session(session: ort.InferenceSession, batch: NDArray[Any]) -> Any:
    """What a half of a bundle makes of `batch` (N, ...).

    Raises:
        BundleError: ONNX Runtime cannot run it, or it gives something else than N of what it should.
    """
    output = session.get_outputs()[0]
    try:
        found = session.run([output.name], {session.get_inputs()[0].name: batch})[0]
    except Exception as error:  # ONNX Runtime raises its own unrelated classes
        raise BundleError(f"the bundle's half that gives {output.name} fails ({_first_line(error)}); export the bundle again.") from error
    if not isinstance(found, np.ndarray) or list(found.shape) != [len(batch), *output.shape[1:]]:
        raise BundleError(f"the bundle's half that gives {output.name} gives another shape than it says; export the bundle again.")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shapes(name: str, session: ort.InferenceSession) -> dict[str, list[Any]]:
    """Shapes of a model's one input and one output, without the batch dimension."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise BundleError(f"{name} has {len(inputs)} inputs and {len(outputs)} outputs; a half has one of each.")
    return {"input": list(inputs[0].shape[1:]), "output": list(outputs[0].shape[1:])}


def _check_fit(out: Path, shapes: Mapping[str, Mapping[str, list[Any]]], preprocessing: Preprocessing, classes: int, points: Sequence[CodecTables]) -> None:
    image = [3, preprocessing.image_size, preprocessing.image_size]
    takes = {name: shape["input"] for name, shape in shapes.items()}
    gives = {name: shape["output"] for name, shape in shapes.items()}
    code = gives.get(DEVICE, image)
    for point in points:
        if not point.fit(tuple(code)):
            raise BundleError(f"{out}: {DEVICE} gives symbols of shape {code}, the codec has {point.takes}; build the tables from its symbols.")
    expected = {DEVICE: (image, code), EDGE: (code, [classes]), DEVICE_ONLY: (image, [classes])}
    for name in shapes:
        if (takes[name], gives[name]) != expected[name]:
            raise BundleError(
                f"{out}: {name} maps {takes[name]} to {gives[name]} where the bundle needs {expected[name][0]} to {expected[name][1]}; export it again."
            )
