"""A bundle's edge half as a model repository of NVIDIA Triton: an ensemble that takes the frames of device halves and gives logits.

Its two steps are the decoding of frames, in Triton's Python backend (`_triton_decode`), and edge.onnx, in its ONNX Runtime backend.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import BundleError, CoinferError
from pipeline.files import atomic_directory
from pipeline.runtime.bundle import CODEC, EDGE, MANIFEST, Bundle, open_session
from pipeline.runtime.lane import Batching
from pipeline.runtime.server import Limits

DECODE_MODEL = Path(__file__).with_name("_triton_decode.py")
LABELS = "labels.txt"
TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}


class Enum(str):
    """A value that a configuration names without quotes."""


def write_repository(bundle: Bundle, out: Path, batching: Batching) -> str:
    """Write the model repository to the new folder `out`, whole or not at all; returns the name under which devices ask for the bundle.

    Raises:
        BundleError: a device-only bundle, or one that was altered.
        CoinferError: `out` is there already, or cannot be written.
    """
    if bundle.kind == "device-only":
        raise BundleError(f"{bundle.path} is a device-only bundle, of which nothing runs on a server; use a bundle of another kind.")
    if out.exists():
        raise CoinferError(f"{out} is there already; remove it, or name a new folder.")
    name = f"coinfer-{bundle.bundle_id.hex()}"
    decode, edge = f"{name}-decode", f"{name}-edge"
    session = open_session(bundle.read(EDGE), 1)
    (network_in,), (network_out,) = session.get_inputs(), session.get_outputs()
    taken, given = ((TYPES[end.type], list(end.shape[1:])) for end in (network_in, network_out))
    opened = "image" if bundle.kind == "edge-only" else "symbols"
    frame, logits = _tensor("frame", "TYPE_STRING", [1]), _tensor("logits", *given) | {"label_filename": LABELS}
    steps = [
        _step(decode, {"frame": "frame"}, {opened: opened}),
        _step(edge, {network_in.name: opened}, {network_out.name: "logits"}),
    ]
    about = {"bundle_id": bundle.manifest["bundle_id"], "kind": bundle.kind, "preprocessing": json.dumps(bundle.preprocessing.to_dict(), sort_keys=True)}
    configs: dict[str, dict[str, Any]] = {
        name: {
            "platform": "ensemble",
            "input": frame,
            "output": logits,
            "ensemble_scheduling": {"step": steps},
            "parameters": [{"key": key, "value": {"string_value": value}} for key, value in about.items()],
        },
        decode: {
            "backend": "python",
            "input": frame,
            "output": _tensor(opened, *taken),
            "instance_group": {"kind": Enum("KIND_CPU")},  # by default each GPU would have one
            "dynamic_batching": _dynamic_batching(Batching()),
        },
        edge: {
            "backend": "onnxruntime",
            "default_model_filename": EDGE,
            "input": _tensor(network_in.name, *taken),
            "output": _tensor(network_out.name, *given) | {"label_filename": LABELS},
            "dynamic_batching": _dynamic_batching(batching),
        },
    }
    labels = "".join(f"{' '.join(label.split())}\n" for label in bundle.classes).encode()
    files = {f"{model}/config.pbtxt": pbtxt({"name": model, "max_batch_size": batching.most, **config}).encode() for model, config in configs.items()}
    files |= {f"{model}/{LABELS}": labels for model in (name, edge)}
    files |= {f"{edge}/1/{EDGE}": bundle.read(EDGE), f"{decode}/1/model.py": DECODE_MODEL.read_bytes()}
    files[f"{decode}/1/{MANIFEST}"] = (bundle.path / MANIFEST).read_bytes()
    if bundle.kind == "split":
        files[f"{decode}/1/{CODEC}"] = bundle.read(CODEC)
    with atomic_directory(out) as folder:
        (folder / name / "1").mkdir(parents=True)  # empty, but Triton loads no model without a version
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    return name


def _tensor(name: str, data_type: str, shape: list[int]) -> dict[str, Any]:
    """`shape` is without the batch dimension."""
    return {"name": name, "data_type": Enum(data_type), "dims": shape}


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    """A step of an ensemble: which of the ensemble's tensors (values) each of the model's (keys) is."""
    maps = {name: [{"key": key, "value": value} for key, value in ends.items()] for name, ends in (("input_map", inputs), ("output_map", outputs))}
    return {"model_name": model, "model_version": -1, **maps}


def _dynamic_batching(batching: Batching) -> dict[str, Any]:
    """As `coinfer edge` does it; without preferred sizes a batch waits for `max_batch_size`."""
    limits = Limits()
    return {
        "max_queue_delay_microseconds": round(1e3 * batching.delay_ms),
        "default_queue_policy": {
            "timeout_action": Enum("REJECT"),
            "default_timeout_microseconds": round(1e6 * limits.patience_s),
            "max_queue_size": limits.waiting,
        },
    }


def pbtxt(fields: Mapping[str, Any]) -> str:
    """`fields` as a protobuf message in text format: mappings are messages, lists repeat, strings are quoted unless an `Enum`."""
    return "".join(f"{line}\n" for line in _lines(fields))


def _lines(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield f"{name} {{"
                yield from (f"  {line}" for line in _lines(each))
                yield "}"
            else:
                yield f"{name}: {json.dumps(each, ensure_ascii=False) if type(each) is not Enum else each}"
