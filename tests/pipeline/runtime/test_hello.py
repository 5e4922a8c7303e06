"""What a device says first."""

import json
import struct

import pytest

from pipeline.errors import FrameError
from pipeline.runtime.hello import HEAD_BYTES, MAX_BYTES, Hello, hello_bytes


def wire(body: bytes) -> bytes:
    return struct.pack(">BH", 0xC2, len(body)) + body


@pytest.mark.parametrize("hello", [Hello(), Hello("camera-1", "0.1.0rc1+g1234_5", "s!cr~t", "00ff00ff", 7)])
def test_it_comes_out_as_it_went_in(hello):
    data = hello.pack()
    assert hello_bytes(data[:HEAD_BYTES]) == len(data)
    assert Hello.unpack(data) == hello


def test_a_later_version_may_say_more():
    assert Hello.unpack(wire(b'{"device":"camera","battery":5}')) == Hello("camera")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[" * 2_000, "cannot be read"),
        (b"[]", "no JSON object"),
        (b'{"device":5}', "device '5'"),
        (b'{"device":"two\\nlines"}', "give a name"),
        (json.dumps({"device": "x" * 65}).encode(), "give a name"),
        (b'{"alone":true}', "alone"),
        (b'{"alone":-1}', "alone"),
        (b'{"version":"\\ud800"}', "version"),
        (b'{"version":"1 or \\"2\\""}', "version"),
        (json.dumps({"version": "1" * 65}).encode(), "version"),
        (b'{"token":"\\ud800"}', "token"),
        (b'{"token":"two words"}', "token"),
        (b'{"compact":"00ff"}', "bundle"),
        (b'{"compact":"00FF00FF"}', "bundle"),
    ],
)
def test_what_is_no_hello_is_refused(body, match):
    with pytest.raises(FrameError, match=match):
        Hello.unpack(wire(body))


def test_a_long_one_is_neither_sent_nor_waited_for():
    with pytest.raises(FrameError, match="too long"):
        Hello(token="x" * MAX_BYTES).pack()
    with pytest.raises(FrameError, match="too long"):
        hello_bytes(struct.pack(">BH", 0xC2, MAX_BYTES + 1))
