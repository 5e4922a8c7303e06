"""Predicted latency by part (METHODS 4), from device profiles and a link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from models.operations import Operation
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.link import Link, link_ms
from pipeline.errors import ProfileError
from pipeline.runtime.images import Format


@dataclass(frozen=True)
class HalfCosts:
    """What a candidate asks of device, link and edge, all of one image.

    `device` are the operations of the device half, encoder included, in `precision`: none for edge-only. `edge` are those of the edge half, decoder
    included, in fp32: the whole network for edge-only, none for device-only. `image_size` is the side of the network's input.
    `frame_bytes` may be a mean over images. `symbols` is what the entropy coder codes, 0 unless a split; `image` is (format, quality) of the file that is sent
    and only set for edge-only. `reply_bytes` is a frame, see `reply_frame_bytes`, and 0 for device-only.
    """

    kind: Literal["split", "edge-only", "device-only"]
    image_size: int
    device: Sequence[Operation] = ()
    edge: Sequence[Operation] = ()
    precision: Literal["fp32", "int8"] = "fp32"
    symbols: int = 0
    frame_bytes: float = 0
    image: tuple[Format, int] | None = None
    reply_bytes: float = 0


def predict(costs: HalfCosts, device: DeviceProfile, edge: DeviceProfile, link: Link) -> dict[str, float]:
    """The parts of METHODS 4 in ms: device (preprocessing and half), encode, link (both ways), decode, edge, and their total.

    Raises:
        ProfileError: a profile lacks the image format; or the half, the image or the quality that this kind of candidate needs is missing.
    """
    _check(costs)
    device_ms = encode_ms = decode_ms = edge_ms = over_link_ms = 0.0
    if costs.image is not None:
        encode_ms, decode_ms = device.image(costs.image_size).encode_ms(*costs.image), edge.image(costs.image_size).decode_ms(*costs.image)
        edge_ms = edge.image(costs.image_size).preprocess.median_ms + edge.half_ms(costs.edge)
    else:
        device_ms = device.image(costs.image_size).preprocess.median_ms + device.half_ms(costs.device, costs.precision)
    if costs.kind == "split":
        edge_ms = edge.half_ms(costs.edge)
    if costs.symbols:
        encode_ms, decode_ms = device.coder_times.encode_ms(costs.symbols), edge.coder_times.decode_ms(costs.symbols)
    if costs.kind != "device-only":
        over_link_ms = link_ms(costs.frame_bytes, costs.reply_bytes, link)
    return {
        "device_ms": device_ms,
        "encode_ms": encode_ms,
        "link_ms": over_link_ms,
        "decode_ms": decode_ms,
        "edge_ms": edge_ms,
        "total_ms": device_ms + encode_ms + over_link_ms + decode_ms + edge_ms,
    }


def _check(costs: HalfCosts) -> None:
    if (costs.image is not None) != (costs.kind == "edge-only"):
        raise ProfileError(f"{costs.kind} costs with image {costs.image}; edge-only sends an image of some (format, quality), nothing else does.")
    for side, other in (("device", "edge-only"), ("edge", "device-only")):
        if bool(getattr(costs, side)) != (costs.kind != other):
            raise ProfileError(f"{costs.kind} costs {'lack the operations of' if costs.kind != other else 'have operations of'} the {side} half.")
