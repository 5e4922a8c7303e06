"""Reaching an edge by its address."""

from __future__ import annotations

import re
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.errors import ParamsError
from pipeline.runtime.address import parse_address
from pipeline.runtime.guard import device_keys
from pipeline.runtime.hello import DEVICE_NAME, Hello
from pipeline.runtime.transport import TcpTransport, Transport


def dial(address: str, keys: Path | None = None, name: str | None = None, compact: bytes = b"") -> Transport:
    """The transport to the edge at `address`, HOST:PORT, which is connected to as soon as something is sent.

    Args:
        keys: this device's (see `guard`), needed beyond loopback.
        name: of this device, told the edge; None: that in the keys, or the machine's.
        compact: the bundle whose frames are sent in the compact profile; empty: they are sent whole.

    Raises:
        ParamsError: `address` is of another form, or `name` cannot be a name, or not with these keys.
        KeysError: keys are needed, or cannot be used.
    """
    host, port = parse_address(address, "127.0.0.1:7070")
    held = device_keys(keys, host)
    if name is not None and not DEVICE_NAME.fullmatch(name):
        raise ParamsError(f"a device cannot be called {name[:80]!r}; give up to 64 letters, digits and _.-")
    if held and name not in (None, held.device):
        raise ParamsError(f"the keys in {keys} are those of {held.device}, not of {name}; leave --name out.")
    hello = Hello(held.device if held else name or _machine(), _version(), held.token if held else "", compact.hex())
    return TcpTransport(host, port, hello=hello, tls=held.context if held else None)


def _machine() -> str:
    found = DEVICE_NAME.match(re.sub(r"[^\w.-]", "-", socket.gethostname(), flags=re.ASCII))
    return found[0] if found else "device"


def _version() -> str:
    try:
        return version("coinfer")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
