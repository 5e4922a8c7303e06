"""HOST:PORT, as users give it."""

from __future__ import annotations

from pipeline.errors import ParamsError


def format_address(host: str, port: int) -> str:
    """What `parse_address` takes."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, example: str, least: int = 1) -> tuple[str, int]:
    """Host and port of `text`, HOST:PORT or [IPV6]:PORT.

    Raises:
        ParamsError: it is not of that form, or the port is below `least`; the sentence gives `example`.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        good = bool(host.encode("idna")) and port.isascii() and port.isdigit() and len(port) <= 5 and least <= int(port) < 65536
    except UnicodeError:
        good = False
    if not good:
        raise ParamsError(f"address {text[:80]!r} is not HOST:PORT; give for instance {example}.")
    return host, int(port)
