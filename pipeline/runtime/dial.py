"""Reaching an edge by its address."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from pipeline.errors import ParamsError
from pipeline.runtime.address import parse_address
from pipeline.runtime.guard import device_keys
from pipeline.runtime.hello import DEVICE_NAME, Hello
from pipeline.runtime.transport import TcpTransport, Transport
from pipeline.runtime.version import coinfer_version


def dial(address: str, keys: Path | None = None, name: str | None = None, compact: bytes = b"") -> Transport:
    """The transport to the edge at `address`, which is connected to as soon as something is sent.

    HOST:PORT and tcp://HOST:PORT: frames over TCP; grpc://HOST:PORT: the Open Inference Protocol, for which the `edge` extra is needed.

    Args:
        keys: this device's (see `guard`), needed beyond loopback.
        name: of this device, told the edge; None: that in the keys, or the machine's.
        compact: the bundle whose frames are sent in the compact profile; empty: they are sent whole.

    Raises:
        ParamsError: `address` is of another form, or `name` cannot be a name, or not with these keys; or gRPC is asked to be compact.
        KeysError: keys are needed, or cannot be used.
        ModuleNotFoundError: gRPC is not installed.
    """
    scheme, _, place = address.rpartition("://")
    if scheme not in ("", "tcp", "grpc"):
        raise ParamsError(f"address {address[:80]!r} names a transport that is neither tcp nor grpc; give HOST:PORT or grpc://HOST:PORT.")
    if scheme == "grpc" and compact:
        raise ParamsError(f"{address} is gRPC, which cannot be compact; use HOST:PORT, or leave --compact out.")
    host, port = parse_address(place, "grpc://127.0.0.1:8001" if scheme == "grpc" else "127.0.0.1:7070")
    held = device_keys(keys, host)
    if name is not None and not DEVICE_NAME.fullmatch(name):
        raise ParamsError(f"a device cannot be called {name[:80]!r}; give up to 64 letters, digits and _.-")
    if held and name not in (None, held.device):
        raise ParamsError(f"the keys in {keys} are those of {held.device}, not of {name}; leave --name out.")
    hello = Hello(held.device if held else name or _machine(), coinfer_version(), held.token if held else "", compact.hex())
    if scheme == "grpc":
        from pipeline.runtime.grpc_transport import GrpcTransport

        return GrpcTransport(host, port, hello=hello, keys=held)
    return TcpTransport(host, port, hello=hello, tls=held.context if held else None)


def _machine() -> str:
    found = DEVICE_NAME.match(re.sub(r"[^\w.-]", "-", socket.gethostname(), flags=re.ASCII))
    return found[0] if found else "device"
