"""A real Ray cluster on this machine, a head and nodes, each a process tree of its own; for tests and benchmarks of what runs on Ray."""

from __future__ import annotations

import compileall
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

RAY = str(Path(sys.executable).with_name("ray"))
NODES = 2
PATIENCE_S = 60


@contextmanager
def ray_cluster(cpus: int, nodes_beside: int = NODES) -> Iterator[str]:
    """Address of the head, which has no CPU for actors; the nodes beside it claim to have `cpus` each. Without any the head has those.

    Raises:
        TimeoutError: a node does not start here within a minute.
    """
    compileall.compile_dir(Path(ray.__file__).parent, quiet=2)  # after a fresh install each of the nodes would, and end for being slow
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_DASHBOARD": "1", "OMP_NUM_THREADS": "1"}
    environment["RAY_AUTH_MODE"] = "disabled"  # the default where the user has no token of Ray's, which `serve run` leaves behind
    environment |= {"RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "300"}  # a node whose agent starts slowly ends itself
    memory = ["--object-store-memory", "80000000", "--block"]
    port = address.split(":")[1]
    head = [
        "--head",
        "--num-cpus",
        "0" if nodes_beside else str(cpus),
        "--port",
        port,
        "--include-dashboard",
        "false",
        "--temp-dir",
        folder,
        "--node-ip-address",
        "127.0.0.1",
    ]
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        with (Path(folder) / f"start-{len(nodes)}.log").open("w") as log:
            nodes.append(subprocess.Popen([RAY, "start", *arguments, *memory], env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        start(*head)
        _wait(lambda: _answers(address))
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        for count in range(1, nodes_beside + 1):  # one after the other: two at a time may take the same port
            start("--address", address, "--num-cpus", str(cpus))
            _wait(lambda count=count: ray.cluster_resources().get("CPU") == count * cpus)
        ray.shutdown()
        yield address
    finally:
        ray.shutdown()
        for node in nodes[::-1]:
            os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            try:
                node.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("the nodes of a Ray cluster do not start here within a minute each")
        time.sleep(0.1)


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True
