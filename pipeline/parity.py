"""The gate between training and release: do the exported halves compute what the trained network computes? (METHODS 3)"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.codec import MultiRateCodec
from models.coinference import CoInference
from pipeline.data import EVALUATION_BATCH
from pipeline.errors import FrameError, ParityError
from pipeline.inference import predict_logits
from pipeline.runtime.bundle import open_session
from pipeline.runtime.coder import CodecTables, as_received, decode, encode
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.preprocess import Preprocessing

LOGITS_TOLERANCE = 1e-3
TOP1_SHARE = 0.999
SYMBOL_SHARE_PER_LEVEL = 1e-6  # ties between two levels are rounded differently now and then
ADVICE = "no bundle is written; export with another version of onnxruntime or torch, or choose another cut"

Numbers = dict[str, float]


def _one_by_one(model: bytes, inputs: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Run an exported model as a device does, on inputs of batch 1 and with one thread: (N, ...)."""
    session = open_session(model, 1)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: value})[0] for value in inputs])


def _tensors(images: Tensor, preprocessing: Preprocessing) -> Iterator[NDArray[np.float32]]:
    return (preprocessing.tensor(image.numpy()) for image in torch.split(images, 1))


def check_whole(network: nn.Module, model: bytes, name: str, preprocessing: Preprocessing, images: Tensor) -> Numbers:
    """Compare the logits of `model` (image -> logits) with those of `network` on `images`, uint8 (N, 3, S, S).

    Raises:
        ParityError: a logit differs by more than 1e-3, or top-1 on more than 0.1 % of the images; `name` is what the message calls the model.
    """
    logits = _one_by_one(model, _tensors(images, preprocessing))
    return _compare(logits, predict_logits(network, images), name)


def check_split(
    network: CoInference,
    device: bytes,
    edge: bytes,
    points: Sequence[CodecTables],
    preprocessing: Preprocessing,
    images: Tensor,
    quantised: bool = False,
) -> Numbers:
    """Compare both halves with `network` on `images`, uint8 (N, 3, S, S), the edge half on the very symbols the device half gives, at every operating point.

    A `quantised` device half is another network than the trained one: it is compared with itself, many images at a time instead of one by one, and the
    chain with the trained edge half on those symbols.

    Raises:
        ParityError: symbols differ beyond 1 + 1e-6*2^bits*count or by more than one level; a frame does not come back exactly; a logit differs by
            more than 1e-3 on the same symbols; top-1 through the whole chain differs on more than 0.1 % of the images.
    """
    symbols = _one_by_one(device, _tensors(images, preprocessing))
    wanted = _many(device, preprocessing, images) if quantised else predict_logits(network.device_half(), images).numpy()
    steps = np.abs(symbols.astype(np.int16) - wanted)
    bits = 8 if points[0].embedded else points[0].bits
    differing, allowed = int((steps > 0).sum()), 1 + SYMBOL_SHARE_PER_LEVEL * 2**bits * steps.size
    if differing > allowed or steps.max() > 1:
        other = "itself run on many images at once" if quantised else "the trained network"
        raise ParityError(
            f"device.onnx gives {differing} of {steps.size} symbols unlike {other} on the validation images, "
            f"by up to {steps.max()} levels, where {allowed:.1f} by one level are allowed; {ADVICE}."
        )
    found = []
    for index, tables in enumerate(points):
        if isinstance(network.codec, MultiRateCodec):
            network.codec.point = index
        arrived = as_received(symbols, tables)
        for place, code in enumerate(symbols):
            _check_frame(place, code, arrived[place], tables)
        logits = _one_by_one(edge, np.split(arrived, len(arrived)))
        whole = predict_logits(network, images)
        chain = _edge_logits(network, as_received(wanted, tables)) if quantised else whole
        found.append(_compare(logits, _edge_logits(network, arrived), "edge.onnx", top1=chain))
        if quantised:
            found[-1]["top1_equal_unquantised"] = float((logits.argmax(1) == whole.argmax(1).numpy()).mean())
    worst = {name: (max if "difference" in name else min)(numbers[name] for numbers in found) for name in found[0]}
    frames = len(symbols) * len(points)
    return {"symbols": steps.size, "symbols_differing": differing, "symbols_allowed": allowed, "frames_exact": frames, **worst}


@torch.no_grad()
def _edge_logits(network: CoInference, symbols: NDArray[np.uint8]) -> Tensor:
    edge = network.edge_half().eval()
    return torch.cat([edge(part) for part in torch.split(torch.from_numpy(symbols), EVALUATION_BATCH)])


def _many(model: bytes, preprocessing: Preprocessing, images: Tensor) -> NDArray[Any]:
    session = open_session(model, 1)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: preprocessing.tensor(part.numpy())})[0] for part in torch.split(images, EVALUATION_BATCH)])


def _check_frame(index: int, code: NDArray[np.uint8], arrived: NDArray[np.uint8], tables: CodecTables) -> None:
    try:
        back = decode(unpack(pack(encode(code, tables), b"gate", Kind.SYMBOLS)).payload, code.shape, tables)
    except FrameError as error:
        raise ParityError(f"the frame of validation image {index} is refused ({error}); {ADVICE}.") from error
    if not np.array_equal(back, arrived):
        raise ParityError(f"the frame of validation image {index} decodes to other symbols than were encoded; {ADVICE}.")


def _compare(logits: NDArray[np.float32], same_input: Tensor, name: str, top1: Tensor | None = None) -> Numbers:
    """Largest difference to `same_input`, and the share of equal top-1 with `top1` (default: the same)."""
    largest = float(np.abs(logits - same_input.numpy()).max())
    if not largest <= LOGITS_TOLERANCE:
        raise ParityError(
            f"{name} gives logits that differ by up to {largest:.2g} from the trained network's on the same input, more than {LOGITS_TOLERANCE:g}; {ADVICE}."
        )
    equal = float((logits.argmax(1) == (same_input if top1 is None else top1).argmax(1).numpy()).mean())
    if equal < TOP1_SHARE:
        raise ParityError(
            f"the exported chain up to {name} agrees with the trained network's top-1 on {equal:.2%} of the validation images, "
            f"less than {TOP1_SHARE:.1%}; {ADVICE}."
        )
    return {"logits_largest_difference": largest, "top1_equal": equal}
