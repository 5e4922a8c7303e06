"""export: the trained network as a bundle of ONNX halves, coder tables and manifest, if it passes the parity gate."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.backbones import build_backbone
from models.channel_plan import ChannelPlan, rebuild
from models.coinference import CoInference
from models.cutting import split
from pipeline.data import load_card, load_split
from pipeline.errors import Interrupted, ModelError
from pipeline.files import atomic_write_bytes, atomic_write_json, read_json
from pipeline.networks import split_network, tables_of
from pipeline.onnx_export import OPSET, export_onnx
from pipeline.params import Params
from pipeline.parity import check_split, check_whole
from pipeline.paths import DATA_CARD, DevicePaths
from pipeline.quantising import quantise
from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, EDGE, Bundle, open_session, write_bundle
from pipeline.runtime.coder import CodecTables
from pipeline.runtime.preprocess import Preprocessing
from pipeline.search.candidate import Candidate

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

TABLE_IMAGES = 10_000  # enough for the statistics of a channel; evenly spread over larger training sets
CALIBRATION_IMAGES = 256
BATCH = 256
WARMUP_TURNS, TIMED_TURNS = 10, 50


def run(params: Params, device: str, tracker: Tracker) -> dict[str, Any]:
    """Write artifacts/DEVICE/bundle and export/{reference.onnx, parity.json}, and return what parity.json holds.

    reference.onnx is the unsplit network that `evaluate` compares with. So is the bundle's device-only.onnx, unless a pruned device-only
    candidate was chosen, which it then holds.

    Raises:
        ParityError: the exported halves do not compute what was trained; then no bundle is written.
        CoinferError: an input is missing or does not fit, or the bundle cannot be written.
        Interrupted: Ctrl-C; nothing is written.
    """
    try:
        return _export(params, DevicePaths(device), tracker)
    except KeyboardInterrupt:
        raise Interrupted(f"export {device} was interrupted; nothing is kept, `dvc repro` starts it over.") from None


def _export(params: Params, paths: DevicePaths, tracker: Tracker) -> dict[str, Any]:
    torch.set_num_threads(params.run.threads)
    spec = read_json(paths.split_spec, "the fine-tuned split")
    candidate, plan = Candidate.from_dict(spec["candidate"]), ChannelPlan.from_dict(spec["plan"])
    card, (validation, _) = load_card(), load_split("validation")
    preprocessing, example = Preprocessing(card.image_size), torch.zeros(2, 3, card.image_size, card.image_size)
    backbone = build_backbone(params.backbone.name, card.num_classes, card.image_size)

    points: tuple[CodecTables, ...] = ()
    files: dict[str, bytes] = {}
    parity: dict[str, dict[str, float]] = {}
    if candidate.kind == "split":
        network = split_network(backbone, example, candidate, plan)
        _load(network, paths.split_weights)
        files = _halves(network, example)
        quantised = candidate.precision == "int8"
        if quantised:
            calibration = torch.split(load_split("train")[0][:CALIBRATION_IMAGES], 1)
            fp32, files[DEVICE] = files[DEVICE], quantise(files[DEVICE], (preprocessing.tensor(image.numpy()) for image in calibration))
            _time_int8((fp32, files[DEVICE]), preprocessing.tensor(validation[:1].numpy()), candidate, tracker)
        symbols = _symbols(files[DEVICE], preprocessing)
        if candidate.codec == "codebook":
            parity["codebook"] = _alive(symbols, candidate)
        points = tables_of(candidate, symbols)
        parity["split"] = check_split(network, files[DEVICE], files[EDGE], points, preprocessing, validation, quantised)
    _load(backbone, paths.reference_weights)
    reference = files[DEVICE_ONLY] = export_onnx(backbone, example, input_name="image", output_name="logits")
    parity["reference"] = check_whole(backbone, reference, paths.reference_onnx.name, preprocessing, validation)
    if candidate.kind == "device-only" and plan.kept:
        whole = rebuild(split(backbone, example, candidate.cut)[0], plan)
        _load(whole, paths.split_weights)
        files[DEVICE_ONLY] = export_onnx(whole, example, input_name="image", output_name="logits")
        parity["device_only"] = check_whole(whole, files[DEVICE_ONLY], DEVICE_ONLY, preprocessing, validation)
    if candidate.kind == "edge-only":
        _load(backbone, paths.split_weights)
        files[EDGE] = export_onnx(backbone, example, input_name="image", output_name="logits")
        parity["edge_only"] = check_whole(backbone, files[EDGE], EDGE, preprocessing, validation)

    result = {"images": len(validation), **parity}
    bundle = write_bundle(
        paths.bundle,
        kind=candidate.kind,
        candidate=candidate.to_dict(),
        plan=plan.to_dict(),
        preprocessing=preprocessing,
        classes=read_json(DATA_CARD, "the data card")["classes"],
        files=files,
        points=points,
        extra={
            "opset": OPSET,
            "params": {"run": params.run.model_dump(), "image_size": card.image_size, "backbone": params.backbone.name},
            "data_sha256": card.sha256,
            "reference": spec["reference"],
        },
    )
    atomic_write_bytes(paths.reference_onnx, reference)
    atomic_write_json(paths.parity, result)
    _track(tracker, bundle, preprocessing.tensor(validation[:1].numpy()))
    tracker.log_metrics({f"parity_{name}.{key}": value for name, numbers in parity.items() for key, value in numbers.items()})
    tracker.log_file(paths.parity)
    return result


def _load(network: nn.Module, path: Path) -> None:
    """Load weights that `finetune` wrote into `network` and put it in evaluation mode."""
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"weights {path} are missing or do not fit the candidate ({str(error).splitlines()[0]}); run `dvc repro` to make them.") from error
    network.eval()


def _halves(network: CoInference, example: Tensor) -> dict[str, bytes]:
    device = network.device_half().eval()
    with torch.no_grad():
        symbols = device(example)
    return {
        DEVICE: export_onnx(device, example, input_name="image", output_name="symbols"),
        EDGE: export_onnx(network.edge_half(), symbols, input_name="symbols", output_name="logits"),
    }


def _time_int8(halves: tuple[bytes, bytes], image: NDArray[np.float32], candidate: Candidate, tracker: Tracker) -> None:
    """Log and print how many times as fast as the first of `halves`, fp32, the second, int8, is here on one thread; stderr says so where it is slower."""
    sessions = [open_session(half, 1) for half in halves]
    ns = np.empty((WARMUP_TURNS + TIMED_TURNS, len(sessions)))
    for turn in ns:  # in turns, so that what else this machine does falls on both
        for place, session in enumerate(sessions):
            start = perf_counter_ns()
            session.run(["symbols"], {"image": image})
            turn[place] = perf_counter_ns() - start
    fp32_ms, int8_ms = np.median(ns[WARMUP_TURNS:], axis=0) / 1e6
    ratio = float(fp32_ms / int8_ms)
    tracker.log_metrics({"fp32_over_int8": ratio})
    print(f"int8 device half: {int8_ms:.3f} ms an image, fp32: {fp32_ms:.3f} ms, {ratio:.2f} times as fast on this machine")
    if ratio < 1:
        _say(
            f"the int8 device half of {candidate.label()} is slower here than the fp32 one; "
            "set search.precision to [fp32], unless the device is another machine and int8 faster there."
        )


def _symbols(model: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Symbols uint8 (N, h, H, W) of the training images through the exported device half."""
    images, _ = load_split("train")
    images = images[:: -(-len(images) // TABLE_IMAGES)]
    session = open_session(model, 1)
    return np.concatenate([session.run(["symbols"], {"image": preprocessing.tensor(part.numpy())})[0] for part in torch.split(images, BATCH)])


def _alive(symbols: NDArray[np.uint8], candidate: Candidate) -> dict[str, float]:
    """How many of the codebook's values the training images use; less than half is said on stderr, and one, with which nothing is sent, a ModelError."""
    used, total = len(np.unique(symbols)), 2 ** (candidate.bits or 0)
    if used == 1:
        raise ModelError(
            f"the codebook of {candidate.label()} has collapsed: every symbol of the training images is the same of its {total} values; "
            "lower codec.commitment or finetune.frozen_learning_rate, or give search.codecs uniform in its place."
        )
    if used < total / 2:
        _say(
            f"the codebook of {candidate.label()} has collapsed in part: the training images use {used} of its {total} values; "
            "lower codec.commitment, or take fewer bits (search.bits)."
        )
    return {"values_used": used}


def _say(sentence: str) -> None:
    print(f"coinfer: {sentence}", file=sys.stderr)


def _track(tracker: Tracker, bundle: Bundle, image: NDArray[np.float32]) -> None:
    tracker.log_params({"bundle_id": bundle.bundle_id.hex(), "kind": bundle.kind, "opset": OPSET})
    for name, shape in bundle.manifest["shapes"].items():
        split_edge = name == EDGE and bundle.kind == "split"
        example = {"symbols": np.zeros((1, *shape["input"]), np.uint8)} if split_edge else {"image": image}
        tracker.log_onnx(bundle.path / name, Path(name).stem, example)
    for path in sorted(bundle.path.glob("*.json")):
        tracker.log_file(path)
