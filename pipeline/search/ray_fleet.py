"""Workers as actors of a Ray cluster; the only module that imports ray."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from typing import Any

from pipeline.errors import CoinferError
from pipeline.search.executor import Served, Setup

CONNECT_TIMEOUT_S = 5.0


class RayFleet:
    """A `Fleet` of actors of as many CPUs as threads on the cluster at `address` (HOST:PORT), in a folder of the same path as this one.

    Raises:
        CoinferError: ray is not installed, or no cluster answers at `address`.
    """

    def __init__(self, setup: Setup, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise CoinferError("search.executor is ray, which is not installed; run `pip install coinfer[cluster]`, or choose local.") from None
        self._ray: Any = ray
        _check_reachable(address)
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


def _check_reachable(address: str) -> None:
    """Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise CoinferError(f"nobody answers at search.ray_address {address} ({error}); start a Ray cluster there, or correct the address.") from None
