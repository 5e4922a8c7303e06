"""The edge server's way in for clients of the Open Inference Protocol (KServe v2) over gRPC; see `pipeline.runtime.oip`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import unquote

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is said in our own words

import grpc  # type: ignore[import-untyped]
import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pipeline.errors import CoinferError, FrameError
from pipeline.runtime import oip
from pipeline.runtime.address import format_address
from pipeline.runtime.edge import REPLY_TIMES, Asked, EdgeHalf
from pipeline.runtime.frame import OVERHEAD_BYTES, Kind, unpack
from pipeline.runtime.guard import EdgeKeys
from pipeline.runtime.hello import Hello
from pipeline.runtime.lane import BUSY, FAILED
from pipeline.runtime.server import EdgeServer
from pipeline.runtime.tally import Refusal
from pipeline.runtime.version import coinfer_version

ROOM_BYTES = 4096  # of a message, beside the payload of the largest frame
MOST_DETAILS = 1000  # characters; a client takes 8 KiB of headers at most

Handle = Callable[[bytes, Any], Awaitable[bytes]]  # a request and gRPC's context of the call -> the answer


class Refused(CoinferError):
    """A request is not answered, for a reason that gRPC has a code for; `counts` as what, unless that has been counted."""

    def __init__(self, code: grpc.StatusCode, reason: str, counts: Refusal | None = None) -> None:
        super().__init__(reason)
        self.code, self.counts = code, counts


class Caller:
    """Who asks for the answer to one element of a request (an `Asker`)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def told(self, reply: bytes) -> None:
        if not self.reply.done():
            self.reply.set_result(reply)

    def is_there(self) -> bool:
        return not self.reply.cancelled()


class GrpcFront:
    """Answers gRPC requests for the bundles of an `EdgeServer` (a `Front`); N elements of a request are N jobs of the bundle's lane.

    Where the server has keys, clients need a certificate, and as metadata `authorization: Bearer TOKEN` and `coinfer-device: NAME`.

    Args:
        port: 0 takes a free one; `announce` is told which.
    """

    def __init__(
        self, host: str, port: int, announce: Callable[[int], object] = lambda port: print(f"edge listens on port {port} for gRPC", flush=True)
    ) -> None:
        self._place, self._announce = (host, port), announce
        self._grpc: Any = None
        self._server: EdgeServer

    async def start(self, server: EdgeServer) -> None:
        limits, (host, port) = server.limits, self._place
        options = {
            "grpc.so_reuseport": 0,  # or a port in use would be shared with whoever has it
            "grpc.max_receive_message_length": limits.payload_bytes + OVERHEAD_BYTES + ROOM_BYTES,
            "grpc.max_connection_idle_ms": int(1e3 * limits.idle_s),
            "grpc.server_handshake_timeout_ms": int(1e3 * limits.partial_s),
            "grpc.max_allowed_incoming_connections": limits.connections,
        }
        self._grpc = grpc.aio.server(options=tuple(options.items()), maximum_concurrent_rpcs=limits.connections)
        handlers = {name: grpc.unary_unary_rpc_method_handler(handle) for name, handle in self.handlers(server).items()}
        self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip.SERVICE, handlers),))
        address = format_address(host, port)
        try:
            bound = self._grpc.add_secure_port(address, _credentials(server.keys)) if server.keys else self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            self._grpc = None
            raise CoinferError(f"edge cannot listen on {address} for gRPC; choose another port or address.") from error
        await self._grpc.start()
        self._announce(bound)

    def handlers(self, server: EdgeServer) -> dict[str, Handle]:
        """By name, what answers the methods of the service for `server`, whoever listens for them."""
        self._server = server
        return {name: self._handler(name, getattr(self, f"_{name}")) for name in oip.METHODS}

    async def stop(self, grace_s: float) -> None:
        if self._grpc is not None:
            await self._grpc.stop(grace_s)

    def _handler(self, called: str, method: Callable[[Any, str], Awaitable[Any]]) -> Handle:
        request_class = oip.message(f"{called}Request")

        async def handle(data: bytes, context: Any) -> bytes:
            tally = self._server.tally
            tally.carried("in", len(data))
            try:
                hello = self._admit(context)
                name = hello.device if self._server.keys else _address(context.peer())
                self._take(name)
                answer = await method(request_class.FromString(data), name)
                if called == "ModelInfer":
                    tally.answered(hello.device, answer.outputs[0].shape[0], hello.alone)
                answer_bytes: bytes = answer.SerializeToString()
                tally.carried("out", len(answer_bytes))
                return answer_bytes
            except Refused as error:
                refused = error
            except FrameError as error:
                refused = _no_request(str(error))
            except DecodeError:
                refused = _no_request(f"request of {len(data)} bytes is no {called}Request; check the client's version of the protocol.")
            if refused.counts:
                tally.refused(refused.counts)
            await context.abort(refused.code, str(refused)[:MOST_DETAILS])
            raise AssertionError  # abort raises

        return handle

    def _take(self, name: str, count: int = 1) -> None:
        """Raises:
        Refused: so many from there are too many now.
        """
        if reason := self._server.over_rate(name, count):
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    def _admit(self, context: Any) -> Hello:
        """Who asks.

        Raises:
            Refused: it may not ask.
        """
        keys, metadata = self._server.keys, {key: str(value) for key, value in context.invocation_metadata()}
        try:
            hello = Hello.from_metadata(metadata)
        except FrameError as error:
            raise _no_request(str(error)) from error
        if keys and (why := keys.refuses(hello, _certified(context))):
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, why, Refusal.KEYS)
        if hello.device:
            self._server.tally.hello(hello)
        return hello

    async def _ServerLive(self, request: Any, name: str) -> Any:
        return oip.message("ServerLiveResponse")(live=True)

    async def _ServerReady(self, request: Any, name: str) -> Any:
        return oip.message("ServerReadyResponse")(ready=self._server.is_ready)

    async def _ServerMetadata(self, request: Any, name: str) -> Any:
        return oip.message("ServerMetadataResponse")(name="coinfer", version=coinfer_version())

    async def _ModelReady(self, request: Any, name: str) -> Any:
        known = request.name in self._models() and request.version in ("", oip.VERSION)
        return oip.message("ModelReadyResponse")(ready=known and not self._server.is_stopping)

    async def _ModelMetadata(self, request: Any, name: str) -> Any:
        half, takes = self._model(request.name, request.version)
        answer = oip.message("ModelMetadataResponse")(name=request.name, versions=[oip.VERSION], platform="onnxruntime_onnx")
        answer.inputs.add(name=takes, datatype="BYTES" if takes == oip.FRAME else "UINT8", shape=[-1, *_shape(half, takes)])
        answer.outputs.add(name=oip.LOGITS, datatype="FP32", shape=[-1, len(half.bundle.classes)])
        return answer

    async def _ModelInfer(self, request: Any, name: str) -> Any:
        if self._server.is_stopping:
            raise Refused(grpc.StatusCode.UNAVAILABLE, "the edge is stopping; try another one, or again later.")
        half, takes = self._model(request.model_name, request.model_version)
        callers: list[Caller] = []
        elements = self._asked(request, half, takes)
        self._take(name, len(elements) - 1)  # beside the first, for which there was one already
        try:
            for asked in elements:
                callers.append(caller := Caller(name))
                self._server.put(half.bundle_id, asked, caller)
                if caller.reply.done():
                    raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, unpack(caller.reply.result()).payload.decode())
            replies = [_payload(await caller.reply) for caller in callers]
        finally:
            for caller in callers:
                caller.reply.cancel()  # where one is refused or the client has gone, nobody waits for the others
        times = max((REPLY_TIMES.unpack_from(reply) for reply in replies), key=sum)
        return _answer(request, [reply[REPLY_TIMES.size :] for reply in replies], times)

    def _asked(self, request: Any, half: EdgeHalf, takes: str) -> Sequence[Asked]:
        """What the elements of a request hold.

        Raises:
            FrameError: not what the model takes.
        """
        if [tensor.name for tensor in request.inputs] != [takes] or len(request.raw_input_contents) > 1:
            raise FrameError(f"request has the inputs {[tensor.name[:80] for tensor in request.inputs][:8]}; {request.model_name} takes one, {takes}.")
        if any(output.name != oip.LOGITS for output in request.outputs):
            raise FrameError(f"request wants another output than {oip.LOGITS}, which is all that {request.model_name} has.")
        (tensor,), raw = request.inputs, request.raw_input_contents[0] if request.raw_input_contents else None
        count, rest = (tensor.shape[0] if tensor.shape else 0), _shape(half, takes)
        limits = self._server.limits
        if not 1 <= count <= limits.waiting or list(tensor.shape[1:]) not in ([rest] if takes == oip.SYMBOLS else [rest, []]):
            raise FrameError(
                f"{takes} has the shape {list(tensor.shape)[:8]} where {request.model_name} takes [N, {str(rest)[1:-1]}], N 1 to {limits.waiting}."
            )
        if takes == oip.SYMBOLS:
            return np.split(oip.uint8(tensor, raw).reshape(tuple(tensor.shape)), count)
        frames = oip.elements(tensor, raw)
        if max(map(len, frames)) > limits.payload_bytes + OVERHEAD_BYTES:
            raise FrameError(f"a frame of {max(map(len, frames))} bytes is more than this edge takes; send at most {limits.payload_bytes} of payload.")
        return frames

    def _models(self) -> dict[str, tuple[EdgeHalf, str]]:
        """Those served now, by name: the half and the name of its input."""
        halves = [lane.half for lane in self._server.lanes.values()]
        found = {oip.model_name(half.bundle_id): (half, oip.FRAME) for half in halves}
        return found | {oip.edge_model_name(half.bundle_id): (half, oip.SYMBOLS) for half in halves if half.bundle.kind == "split"}

    def _model(self, name: str, asked_version: str) -> tuple[EdgeHalf, str]:
        models = self._models()
        if name not in models:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"model {name[:80]!r} is not served; this edge has {', '.join(sorted(models)) or 'none'}.", Refusal.BUNDLE)
        if asked_version not in ("", oip.VERSION):
            reason = f"version {asked_version[:80]!r} of {name} is not served; ask for {oip.VERSION}, or for none."
            raise Refused(grpc.StatusCode.NOT_FOUND, reason, Refusal.BUNDLE)
        return models[name]


def _shape(half: EdgeHalf, takes: str) -> list[int]:
    """Of one element of that input."""
    return list(half.bundle.code_shape) if takes == oip.SYMBOLS else [1]


def _no_request(reason: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, reason, Refusal.FRAME)


def _certified(context: Any) -> str:
    """Whose certificate a client has shown."""
    return next(iter(context.auth_context().get("x509_common_name", ())), b"").decode(errors="replace")


def _payload(reply: bytes) -> bytes:
    opened = unpack(reply)
    if opened.kind is Kind.ERROR:
        reason = opened.payload.decode()
        codes = {BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED, FAILED: grpc.StatusCode.INTERNAL}
        raise Refused(next((code for start, code in codes.items() if reason.startswith(start)), grpc.StatusCode.INVALID_ARGUMENT), reason)
    return opened.payload


def _answer(request: Any, logits: Sequence[bytes], times: Sequence[float]) -> Any:
    """With raw contents where the request has them."""
    answer = oip.ModelInferResponse(model_name=request.model_name, model_version=oip.VERSION, id=request.id)
    output = answer.outputs.add(name=oip.LOGITS, datatype="FP32", shape=[len(logits), len(logits[0]) // 4])
    if request.raw_input_contents:
        answer.raw_output_contents.append(b"".join(logits))
    else:
        output.contents.fp32_contents.extend(np.frombuffer(b"".join(logits), "<f4"))
    for name, ms in zip(oip.TIMES, times, strict=True):
        answer.parameters[name].double_param = ms
    return answer


def _credentials(keys: EdgeKeys) -> grpc.ServerCredentials:
    key, certificate, authority = keys.pems()
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=authority, require_client_auth=True)


def _address(peer: str) -> str:
    """The host of `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`, as TCP clients are known by."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")
