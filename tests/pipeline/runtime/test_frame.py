import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import FrameError
from pipeline.runtime.frame import MAX_PAYLOAD_BYTES, OVERHEAD_BYTES, Frame, Kind, pack, unpack

ID = bytes.fromhex("0123abcd")
frames = st.builds(lambda payload, kind: pack(payload, ID, kind), st.binary(max_size=60), st.sampled_from(Kind))


@given(st.binary(max_size=200), st.binary(min_size=4, max_size=4), st.sampled_from(Kind))
def test_a_frame_opens_to_what_was_packed_and_costs_13_bytes(payload, bundle_id, kind):
    frame = pack(payload, bundle_id, kind)
    assert unpack(frame) == Frame(kind, bundle_id, payload)
    assert len(frame) == len(payload) + OVERHEAD_BYTES
    assert OVERHEAD_BYTES == 13


@given(frames, st.data())
def test_any_flipped_bit_is_refused(frame, data):
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    with pytest.raises(FrameError):
        unpack((int.from_bytes(frame, "big") ^ 1 << bit).to_bytes(len(frame), "big"))


@given(frames, st.data())
def test_any_missing_or_extra_byte_is_refused(frame, data):
    at = data.draw(st.integers(0, len(frame) - 1))
    byte = data.draw(st.binary(min_size=1, max_size=1))
    for wrong in (frame[:at] + frame[at + 1 :], frame[:at], frame[:at] + byte + frame[at:], frame + byte):
        with pytest.raises(FrameError):
            unpack(wrong)


@given(st.binary(max_size=100))
def test_noise_is_refused(noise):
    with pytest.raises(FrameError):
        unpack(noise)


def test_the_message_says_what_is_wrong():
    frame = pack(b"payload", ID, Kind.SYMBOLS)
    with pytest.raises(FrameError, match="another version"):
        unpack(b"\xc2" + frame[1:])
    with pytest.raises(FrameError, match="has 19 bytes where its header says 20"):
        unpack(frame[:-1])
    with pytest.raises(FrameError, match="checksum does not match"):
        unpack(frame[:-1] + bytes([frame[-1] ^ 1]))
    with pytest.raises(FrameError, match="cut short"):
        unpack(b"")
    with pytest.raises(FrameError, match="unknown kind 9"):
        unpack(pack(b"", ID, 9))


def test_a_payload_of_16_mib_is_refused():
    with pytest.raises(FrameError, match="too large"):
        pack(bytes(MAX_PAYLOAD_BYTES + 1), ID, Kind.IMAGE)
