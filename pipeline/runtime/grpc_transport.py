"""Frames to an edge that speaks the Open Inference Protocol (KServe v2) over gRPC: ours, Triton, KServe. See `pipeline.runtime.oip`."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is said in our own words

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pipeline.errors import FrameError
from pipeline.runtime import oip
from pipeline.runtime.address import format_address
from pipeline.runtime.edge import REPLY_TIMES
from pipeline.runtime.frame import Kind, pack
from pipeline.runtime.guard import DeviceKeys
from pipeline.runtime.hello import Hello
from pipeline.runtime.transport import REPLY_TIMEOUT_S, EdgeUnreachable, distrust, excerpt

OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, whatever earlier ones met; when to try is for the caller to say
    ("grpc.enable_http_proxy", 0),  # like frames over TCP
    ("grpc.enable_retries", 0),
    ("grpc.http2.bdp_probe", 0),  # replies are small, and on a narrow link its pings are not
)
LONGEST_MS = 1e9
DISTRUST = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]+)|Hostname Verification Check failed")  # in the details of UNAVAILABLE
AWAY = {grpc.StatusCode.UNAVAILABLE: "", grpc.StatusCode.DEADLINE_EXCEEDED: "timed out", grpc.StatusCode.CANCELLED: ""}


class GrpcTransport:
    """One channel to a v2 server, over which a frame goes to the model of its bundle (a `Transport`).

    The channel is opened by the first request and again after a failure.

    Args:
        hello: said with every request, as metadata.
        keys: with which the channel is secured; None: not at all.
    """

    def __init__(self, host: str, port: int, *, hello: Hello | None = None, keys: DeviceKeys | None = None) -> None:
        self._address = format_address(host, port)
        self._hello, self._keys = hello or Hello(), keys
        self._metadata = self._hello.to_metadata()
        self.alone = 0
        self._channel: Any = None
        self._infer: Any = None

    def request(self, frame: bytes, timeout_s: float = REPLY_TIMEOUT_S) -> bytes:
        """Send one frame and make a reply frame of the answer, an ERROR frame where the server refuses.

        Raises:
            EdgeUnreachable: no connection, or it broke, or no answer came in time; after a break one new connection is tried.
            FrameError: the answer is none to such a request.
        """
        kept, end_s = self._channel is not None, time.monotonic() + timeout_s
        try:
            data = self._call(_request(frame), end_s)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            if code not in AWAY:
                return pack((error.details() or code.name).encode(), frame[1:5], Kind.ERROR)
            self.close()
            if kept and code is grpc.StatusCode.UNAVAILABLE:  # an edge that restarted has dropped the old connection
                return self.request(frame, end_s - time.monotonic())
            details, checks = error.details() or code.name, "check address and keys" if self._keys else "check the address"
            if found := DISTRUST.search(details):
                raise distrust(f"grpc://{self._address}", found[1] or "Hostname mismatch") from error
            raise EdgeUnreachable(
                f"edge grpc://{self._address} does not answer ({AWAY[code] or excerpt(details)}); start it with `coinfer edge --grpc-port` or {checks}."
            ) from error
        return _reply(data, frame[1:5])

    def message_bytes(self, frame: bytes) -> int:
        """Without HTTP/2's headers, which are some hundred bytes at first and a few afterwards."""
        return len(_request(frame))

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _call(self, request: bytes, end_s: float) -> bytes:
        if self._channel is None:
            self._channel = self._opened()
            self._infer = self._channel.unary_unary(oip.path("ModelInfer"))
        alone = self.alone
        data: bytes = self._infer(request, end_s - time.monotonic(), replace(self._hello, alone=alone).to_metadata() if alone else self._metadata)
        self.alone -= alone
        return data

    def _opened(self) -> Any:
        if self._keys is None:
            return grpc.insecure_channel(self._address, OPTIONS)
        key, certificate, authority = self._keys.pems()
        return grpc.secure_channel(self._address, grpc.ssl_channel_credentials(authority, key, certificate), OPTIONS)


def _request(frame: bytes) -> bytes:
    contents: bytes = oip.ModelInferRequest(raw_input_contents=[oip.raw_elements([frame])]).SerializeToString()
    return _head(frame[1:5]) + contents  # one message after another are one with the fields of both


@lru_cache
def _head(bundle_id: bytes) -> bytes:
    """What every request for that bundle says."""
    request = oip.ModelInferRequest(model_name=oip.model_name(bundle_id))
    request.inputs.add(name=oip.FRAME, datatype="BYTES", shape=[1, 1])
    data: bytes = request.SerializeToString()
    return data


def _reply(data: bytes, bundle_id: bytes) -> bytes:
    try:
        answer = oip.ModelInferResponse.FromString(data)
    except DecodeError as error:
        raise FrameError(f"the edge's answer of {len(data)} bytes is no ModelInferResponse; check that it speaks the Open Inference Protocol.") from error
    names = [output.name for output in answer.outputs]
    if oip.LOGITS not in names:
        raise FrameError(f"the edge's answer has the outputs {[name[:80] for name in names[:8]]} and no {oip.LOGITS}; check its model.")
    place = names.index(oip.LOGITS)
    raw = answer.raw_output_contents
    if raw and len(raw) != len(names):
        raise FrameError(f"the edge's answer has {len(raw)} raw contents for {len(names)} outputs; check its version of the protocol.")
    logits = oip.float32(answer.outputs[place], raw[place] if raw else None)
    times = [oip.parameter(answer, name) or 0.0 for name in oip.TIMES]
    if not all(0 <= ms < LONGEST_MS for ms in times):
        raise FrameError(f"the edge's answer took {times} ms by its own account, which cannot be; check its version.")
    return pack(REPLY_TIMES.pack(*times) + logits.astype("<f4").tobytes(), bundle_id, Kind.REPLY)
