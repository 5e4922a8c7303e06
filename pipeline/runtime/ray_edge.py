"""The edge half as a Ray Serve application: replicas on many machines behind Serve's gRPC proxies, which devices speak to as to `coinfer edge --grpc-port`.

What crosses between proxy and replica are the bytes of the Open Inference Protocol, on Ray's own wire. See docs/scale-out.md for how to start it.
"""

# Without `from __future__ import annotations`: Serve makes of an application's arguments what the annotation of `app` is, not what it says.
import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from pipeline.runtime import oip
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.grpc_front import GrpcFront
from pipeline.runtime.lane import Batching
from pipeline.runtime.server import EdgeServer, Limits


class Settings(BaseModel):
    """Arguments of the application, as `serve run` and a Serve config give them."""

    model_config = ConfigDict(extra="forbid")

    bundle: Path = Field(description="folder that `export` wrote, at this path on every machine")
    replicas: int = Field(1, ge=1)
    threads: int = Field(1, ge=1, description="ONNX Runtime threads of a replica, and CPUs it asks Ray for")
    max_batch: int = Field(8, ge=1, description="frames that run together")
    max_delay: float = Field(0, ge=0, le=10_000, description="ms that a frame waits for others")
    max_waiting: int = Field(256, ge=1, description="frames at a replica; more are sent to another, or answered as too many")
    signed_by: Path | None = Field(None, description="public key, at this path on every machine; a bundle that is not signed with its other half is refused")


@dataclass(frozen=True)
class Answer:
    """A message in bytes already; Serve asks what it sends to become that."""

    data: bytes = b""

    def SerializeToString(self) -> bytes:
        return self.data


class Call:
    """gRPC's context of a call, as far as `GrpcFront` uses it, over what a replica gets of it."""

    class Aborted(Exception):
        pass

    def __init__(self, context: RayServegRPCContext) -> None:
        self._context = context

    def peer(self) -> str:
        return str(self._context.peer())

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return list(self._context.invocation_metadata())

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self._context.set_code(code)
        self._context.set_details(details)
        raise self.Aborted


class Edge:
    """A replica. Serve calls the method that a request names."""

    def __init__(self, bundle: str, threads: int, max_batch: int, max_delay: float, max_waiting: int, signed_by: str | None) -> None:
        limits = Limits(waiting=max_waiting, per_second=math.inf)  # all come from a few proxies; Serve limits what waits
        server = EdgeServer(Batching(max_batch, max_delay), limits)
        server.loop = asyncio.get_running_loop()
        server.add(EdgeHalf(_loaded(Path(bundle), Path(signed_by) if signed_by else None), threads))
        self._handlers = GrpcFront("", 0).handlers(server)

    async def _answer(self, method: str, request: bytes, context: RayServegRPCContext) -> Answer:
        try:
            return Answer(await self._handlers[method](request, Call(context)))
        except Call.Aborted:
            return Answer()

    async def ServerLive(self, request: bytes, grpc_context: RayServegRPCContext) -> Answer:
        return await self._answer("ServerLive", request, grpc_context)

    async def ServerReady(self, request: bytes, grpc_context: RayServegRPCContext) -> Answer:
        return await self._answer("ServerReady", request, grpc_context)

    async def ServerMetadata(self, request: bytes, grpc_context: RayServegRPCContext) -> Answer:
        return await self._answer("ServerMetadata", request, grpc_context)

    async def ModelReady(self, request: bytes, grpc_context: RayServegRPCContext) -> Answer:
        return await self._answer("ModelReady", request, grpc_context)

    async def ModelMetadata(self, request: bytes, grpc_context: RayServegRPCContext) -> Answer:
        return await self._answer("ModelMetadata", request, grpc_context)

    async def ModelInfer(self, request: bytes, grpc_context: RayServegRPCContext) -> Answer:
        return await self._answer("ModelInfer", request, grpc_context)


def _loaded(bundle: Path, signed_by: Path | None) -> Bundle:
    loaded = Bundle.load(bundle)
    if signed_by is not None:
        from pipeline.runtime.signing import Signer

        Signer(signed_by).check(loaded)
    return loaded


def add_to_server(servicer: object, server: Any) -> None:
    """Tell Serve's proxy of the service; it sends the requests to replicas as the bytes they are. For `grpc_servicer_functions`."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in oip.METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip.SERVICE, handlers),))


def app(settings: Settings) -> serve.Application:
    """Build the application, for `serve run pipeline.runtime.ray_edge:app bundle=...` or a Serve config.

    Raises:
        BundleError: no bundle of a kind with an edge half is in that folder, or it is not signed as it should be.
        KeysError: no public key is in the file `signed_by`.
    """
    EdgeHalf(_loaded(settings.bundle, settings.signed_by))  # said here in one sentence, not by each replica over and over
    configured = serve.deployment(
        name="Edge", num_replicas=settings.replicas, max_ongoing_requests=settings.max_waiting, ray_actor_options={"num_cpus": settings.threads}
    )
    signed_by = str(settings.signed_by.resolve()) if settings.signed_by else None
    return configured(Edge).bind(str(settings.bundle.resolve()), settings.threads, settings.max_batch, settings.max_delay, settings.max_waiting, signed_by)
