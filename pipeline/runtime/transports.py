"""Which transport an address stands for."""

from __future__ import annotations

from pipeline.errors import ParamsError
from pipeline.runtime.address import parse_address
from pipeline.runtime.transport import TcpTransport, Transport


def transport_to(address: str) -> Transport:
    """The transport to `HOST:PORT` or `tcp://HOST:PORT` (frames over TCP), or `grpc://HOST:PORT` (Open Inference Protocol).

    Raises:
        ParamsError: `address` is not of that form.
        ModuleNotFoundError: gRPC is not installed.
    """
    scheme, separator, place = address.partition("://")
    if not separator:
        return TcpTransport.at(address)
    if scheme == "tcp":
        return TcpTransport.at(place)
    if scheme == "grpc":
        from pipeline.runtime.grpc_transport import GrpcTransport  # the extra `edge`

        return GrpcTransport(*parse_address(place, "grpc://127.0.0.1:8001"))
    raise ParamsError(f"address {address[:80]!r} names a transport that is neither tcp nor grpc; give HOST:PORT or grpc://HOST:PORT.")
