"""What the fastest server could do: `python benchmarks/echo.py tcp|grpc` sends back what it gets, on a port of 127.0.0.1 that it prints."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from typing import Any

import grpc

LENGTH = struct.Struct(">I")
METHOD = "/echo.Echo/Echo"


def received(connection: socket.socket, count: int) -> bytes:
    """The next `count` bytes; fewer where the other side has closed."""
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def serve_tcp() -> None:
    """Blocking sockets, one connection: a length of four bytes, then as many bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while head := received(connection, LENGTH.size):
                connection.sendall(head + received(connection, *LENGTH.unpack(head)))


async def serve_grpc() -> None:
    async def echo(data: bytes, context: Any) -> bytes:
        return data

    server = grpc.aio.server()
    service, method = METHOD[1:].split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: grpc.unary_unary_rpc_method_handler(echo)}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    if sys.argv[1] == "grpc":
        asyncio.run(serve_grpc())
    else:
        serve_tcp()
