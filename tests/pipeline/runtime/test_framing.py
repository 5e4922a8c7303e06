"""The compact profile carries every frame of its bundle unchanged, in 6 bytes more than the payload, and lets no damage through."""

import numpy as np
import pytest

from pipeline.errors import FrameError
from pipeline.runtime.frame import MAX_PAYLOAD_BYTES, Kind, pack, unpack
from pipeline.runtime.framing import Compact, Whole

OURS = b"ours"


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("payload_bytes", "overhead_bytes"), [(0, 6), (1, 6), (16_382, 6), (16_383, 10), (16_384, 10), (100_000, 10)])
def test_frames_come_out_as_they_went_in(kind, payload_bytes, overhead_bytes):
    frame = pack(np.random.default_rng(0).bytes(payload_bytes), OURS, kind)
    message = Compact(OURS).outgoing(frame)
    assert len(message) == payload_bytes + overhead_bytes
    assert Compact(OURS).incoming(message) == frame


@pytest.mark.parametrize("framing", [Whole(), Compact(OURS)])
@pytest.mark.parametrize("payload_bytes", [0, 5, 20_000])
def test_a_message_tells_its_length_as_soon_as_it_can(framing, payload_bytes):
    message = framing.outgoing(pack(bytes(payload_bytes), OURS, Kind.SYMBOLS))
    data = b""
    while len(data) < (need := framing.need(data)):  # what is said before the length is known never asks for more than the message has
        assert need <= len(message)
        data = message[:need]
    assert data == message
    assert framing.need(message[: framing.head_bytes]) == len(message)


def test_every_damaged_bit_is_found():
    message = Compact(OURS).outgoing(pack(b"payload", OURS, Kind.SYMBOLS))
    for bit in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError, match="damaged"):
            Compact(OURS).incoming(bytes(damaged))


def test_another_bundle_is_found():
    with pytest.raises(FrameError, match="damaged"):
        Compact(OURS).incoming(Compact(b"them").outgoing(pack(b"payload", b"them", Kind.SYMBOLS)))


def test_no_length_asks_for_more_than_a_frame_can_hold():
    assert Compact(OURS).need(b"\x3f\xff" + MAX_PAYLOAD_BYTES.to_bytes(4, "big")) == MAX_PAYLOAD_BYTES + 10
    with pytest.raises(FrameError, match="too large"):
        Compact(OURS).need(b"\x3f\xff" + (MAX_PAYLOAD_BYTES + 1).to_bytes(4, "big"))


def test_a_refusal_that_names_no_bundle_arrives():
    opened = unpack(Compact(OURS).incoming(Compact(OURS).outgoing(pack(b"busy", bytes(4), Kind.ERROR))))
    assert (opened.kind, opened.payload) == (Kind.ERROR, b"busy")
