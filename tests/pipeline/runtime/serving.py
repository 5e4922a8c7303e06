"""A server in a thread of the test, and what is said to it."""

import socket
import threading
import time
from dataclasses import dataclass

import numpy as np

from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import REPLY_TIMES, EdgeHalf
from pipeline.runtime.frame import Kind, unpack
from pipeline.runtime.server import EdgeServer
from pipeline.runtime.transport import receive_frame


@dataclass
class Running:
    server: EdgeServer
    port: int
    grpc_port: int = 0

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), 10)
        connection.settimeout(10)
        return connection

    def call(self, function, *arguments) -> None:
        done = threading.Event()
        self.server.loop.call_soon_threadsafe(lambda: (function(*arguments), done.set()))
        assert done.wait(10)


def frames_of(bundle, count: int) -> list[bytes]:
    device, rng = DeviceHalf(bundle), np.random.default_rng(0)
    return [device.run(rng.integers(0, 256, (3, 8, 8)).astype(np.uint8))[0] for _ in range(count)]


def logits(reply: bytes) -> np.ndarray:
    opened = unpack(reply)
    assert opened.kind is Kind.REPLY, opened.payload
    return np.frombuffer(opened.payload, "<f4", offset=REPLY_TIMES.size)


def said(reply: bytes) -> str:
    opened = unpack(reply)
    assert opened.kind is Kind.ERROR
    return opened.payload.decode()


def ask(connection: socket.socket, frame: bytes) -> bytes:
    connection.sendall(frame)
    reply = receive_frame(connection)
    assert reply is not None
    return reply


class Gate:
    """Holds edge halves back while it is shut, and notes how many frames each batch has."""

    def __init__(self) -> None:
        self.is_open, self.began, self.sizes = threading.Event(), threading.Event(), []

    def run(self, half, batch):
        self.sizes.append(len(batch))
        self.began.set()
        assert self.is_open.wait(20)
        return RUN(half, batch)


RUN = EdgeHalf.run


def eventually(check) -> None:
    end_s = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end_s
        time.sleep(0.02)
