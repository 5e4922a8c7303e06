"""Predicted latency by part (METHODS 4), from device profiles and a link."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.costs.device_profile import BackboneProfile, DeviceProfile
from pipeline.costs.link import Link, wire_bytes
from pipeline.errors import ProfileError
from pipeline.runtime.frame import OVERHEAD_BYTES


def reply_frame_bytes(classes: int) -> int:
    """A reply frame: the edge's two times and the logits, all float32."""
    return OVERHEAD_BYTES + 4 * (2 + classes)


@dataclass(frozen=True)
class HalfCosts:
    """What a candidate asks of device, link and edge.

    `block_macs` holds every block on the device side of `cut` at its (pruned) MACs: none for edge-only, all for device-only.
    `frame_bytes` may be a mean over images. `symbols`, `encoder_macs` and `decoder_macs` are of one image and 0 unless a split;
    `quality` is that of the WebP image and only set for edge-only. `reply_bytes` is a frame, see `reply_frame_bytes`, and 0 for device-only.
    """

    kind: Literal["split", "edge-only", "device-only"]
    backbone_key: str
    cut: str
    block_macs: Mapping[str, float]
    encoder_macs: float = 0
    decoder_macs: float = 0
    symbols: int = 0
    frame_bytes: float = 0
    quality: int | None = None
    reply_bytes: float = 0


def mean_wire_bytes(frame_bytes: float) -> float:
    """Wire bytes of frames that are `frame_bytes` on average, as if all had that size."""
    whole = math.ceil(frame_bytes)
    return frame_bytes + wire_bytes(whole) - whole


def link_ms(frame_bytes: float, reply_bytes: float, link: Link) -> float:
    """Uplink, round trip and reply of one request on an idle link, in ms."""
    return link.transmit_ms(mean_wire_bytes(frame_bytes)) + link.rtt_ms + link.transmit_ms(mean_wire_bytes(reply_bytes))


def predict(costs: HalfCosts, device: DeviceProfile, edge: DeviceProfile, link: Link) -> dict[str, float]:
    """The parts of METHODS 4 in ms: device (preprocessing and half), encode, link (both ways), decode, edge, and their total.

    Raises:
        ProfileError: a profile lacks the backbone, the cut, a block or the codec.
    """
    on_device, on_edge = device.backbone(costs.backbone_key), edge.backbone(costs.backbone_key)
    _check_blocks(costs, on_device)
    device_ms = encode_ms = decode_ms = edge_ms = 0.0
    if costs.kind == "edge-only":
        if costs.quality is None:
            raise ProfileError("edge-only costs need the quality of the WebP image that is sent.")
        encode_ms, decode_ms = on_device.webp_encode_ms(costs.quality), on_edge.webp_decode.median_ms
        edge_ms = on_edge.preprocess.median_ms + on_edge.full.median_ms
    else:
        device_ms = on_device.preprocess.median_ms + on_device.half_ms(costs.block_macs)
    if costs.kind == "split":
        device_ms += on_device.codec_ms("encoder", costs.cut, costs.encoder_macs)
        encode_ms, decode_ms = device.coder.encode_ms(costs.symbols), edge.coder.decode_ms(costs.symbols)
        tail = on_edge.blocks[len(on_edge.blocks_up_to(costs.cut)) :]
        edge_ms = on_edge.half_ms({block.name: block.points[-1].macs for block in tail}) + on_edge.codec_ms("decoder", costs.cut, costs.decoder_macs)
    over_link_ms = 0.0 if costs.kind == "device-only" else link_ms(costs.frame_bytes, costs.reply_bytes, link)
    return {
        "device_ms": device_ms,
        "encode_ms": encode_ms,
        "link_ms": over_link_ms,
        "decode_ms": decode_ms,
        "edge_ms": edge_ms,
        "total_ms": device_ms + encode_ms + over_link_ms + decode_ms + edge_ms,
    }


def _check_blocks(costs: HalfCosts, profile: BackboneProfile) -> None:
    expected = {block.name for block in profile.blocks_up_to(costs.cut)}
    if expected != set(costs.block_macs):
        odd = sorted(expected ^ set(costs.block_macs))[0]
        raise ProfileError(f"the device half up to cut {costs.cut} is made of {', '.join(sorted(expected)) or 'nothing'}; block {odd} is missing or too many.")
