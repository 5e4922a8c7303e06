"""Workers as actors of a Ray cluster; the only module that imports ray."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from pipeline.errors import CoinferError
from pipeline.search.executor import Served, Setup

CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 8.0
DATA, HEADERS, SETTINGS = 0, 1, 4  # kinds of HTTP/2's frames
ALIVE, NOT_IMPLEMENTED = b"/ray.rpc.NodeInfoGcsService/CheckAlive", b"\x0bgrpc-status\x0212"


class RayFleet:
    """A `Fleet` of actors of as many CPUs as threads on the cluster at `address`, in a folder of the same path as this one.

    `address` is HOST:PORT, or `auto`: RAY_ADDRESS, else the cluster that runs on this machine.

    Raises:
        CoinferError: ray is not installed, or no cluster answers at `address`.
    """

    def __init__(self, setup: Setup, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise CoinferError("search.executor is ray, which is not installed; run `pip install coinfer[cluster]`, or choose local.") from None
        self._ray: Any = ray
        known = os.environ.get("RAY_ADDRESS") if address == "auto" else address  # Ray looks there first
        if known:
            _check_answers(known)
        environment = {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": str(setup.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        try:
            ray.init(address=address, runtime_env={"env_vars": environment}, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CoinferError(f"no Ray cluster can be used at search.ray_address {address} ({reason}); start one there, or correct the address.") from None
        # Ray restarts nothing by itself: what died, and what it was doing, is for the pool to know.
        self._actor = ray.remote(num_cpus=setup.threads, max_restarts=0, max_task_retries=0)(_Actor)
        self._setup = setup.to_json()
        self._actors: dict[int, Any] = {}
        self._replies: dict[Any, int] = {}
        self._count = 0

    def start(self) -> int:
        worker, self._count = self._count, self._count + 1
        self._actors[worker] = self._actor.remote(self._setup, os.getcwd())
        self._replies[self._actors[worker].ready.remote()] = worker
        return worker

    def send(self, worker: int, line: str) -> None:
        self._replies[self._actors[worker].answer.remote(line)] = worker

    def receive(self, timeout_s: float) -> tuple[int, str | None] | None:
        done, _ = self._ray.wait(list(self._replies), num_returns=1, timeout=timeout_s)
        if not done:
            return None
        worker = self._replies.pop(done[0])
        try:
            line: str = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:  # of its process, its machine or its memory; an exception it would have answered with
            print(f"a worker on the Ray cluster died: {next(iter(str(error).splitlines()), error)}", file=sys.stderr)
            self._ray.kill(self._actors.pop(worker))
            return worker, None
        return worker, line

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            for actor in self._actors.values():
                self._ray.kill(actor)
        self._ray.shutdown()


class _Actor:
    """A `Served` in the folder that the driver runs in."""

    def __init__(self, setup: str, folder: str) -> None:
        self._served, self._folder = Served(setup), folder

    def ready(self) -> str:
        try:
            os.chdir(self._folder)
        except OSError as error:
            machine = socket.gethostname()
            return json.dumps({"error": f"{self._folder} cannot be used on {machine} of the Ray cluster ({error.strerror}); share the folder with it."})
        return self._served.ready()

    def answer(self, line: str) -> str:
        return self._served.answer(line)


def _check_answers(address: str) -> None:
    """Ask whatever listens at `address` what only the head of a cluster answers; Ray itself would wait for minutes, also for a web server.

    Raises:
        CoinferError: nobody listens there, or something else does.
    """
    host, _, port = address.rpartition(":")
    try:
        line = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
    except (OSError, ValueError, OverflowError) as error:
        raise CoinferError(f"nobody answers at search.ray_address {address} ({error}); start a Ray cluster there, or correct the address.") from None
    with line:
        if os.environ.get("RAY_USE_TLS", "0") == "0" and not _is_head(line, address):
            raise CoinferError(
                f"what answers at search.ray_address {address} is no head of a Ray cluster; give the port of `ray start --head --port=PORT`, by default 6379."
            )


def _is_head(line: socket.socket, address: str) -> bool:
    """Whether the head of a Ray cluster is at the other end of `line`; True also where that is left to Ray to find out, as with a cluster that wants a token.

    One call over gRPC (HTTP/2, RFC 9113 and 7541), written out because Ray comes without grpcio: it is answered with data by a head, and by any other
    gRPC server, such as that of Ray's own clients or of a node, with the status "not implemented".
    """
    headers = (
        b"\x83\x86"
        + b"".join(  # POST, http
            name + bytes([len(value)]) + value for name, value in ((b"\x04", ALIVE), (b"\x01", address.encode()[:126]), (b"\x0f\x10", b"application/grpc"))
        )
    )
    headers += b"\x00\x02te\x08trailers"
    deadline, received = time.monotonic() + ANSWER_TIMEOUT_S, b""
    try:
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, b"") + _frame(HEADERS, 4, 1, headers) + _frame(DATA, 1, 1, bytes(5)))
        while (left := deadline - time.monotonic()) > 0:
            line.settimeout(left)
            if not (more := line.recv(1 << 16)):
                return False
            received += more
            if len(received) > 3 and received[3] != SETTINGS:
                return False  # the first frame of all that speak HTTP/2
            for kind, content in _frames(received):
                if kind == HEADERS and NOT_IMPLEMENTED in content:
                    return False
                if kind == DATA or (kind == HEADERS and b"grpc-status" in content):
                    return True
    except OSError:
        pass
    return False


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def _frames(received: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each frame that is complete."""
    while len(received) >= 9 and len(received) >= (end := 9 + int.from_bytes(received[:3], "big")):
        yield received[3], received[9:end]
        received = received[end:]
