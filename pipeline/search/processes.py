"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections import deque

from pipeline.search.executor import Setup


class ProcessFleet:
    """A `Fleet` of spawned `python -m pipeline.search.worker`, each with a pipe to and from it and `setup.threads` threads."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._selector = selectors.DefaultSelector()
        self._heard: deque[tuple[int, str | None]] = deque()
        self._partial: dict[int, bytes] = {}
        self._count = 0

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def start(self) -> int:
        threads = str(self._setup.threads)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # as here, wherever this was started from
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        command = [sys.executable, "-m", "pipeline.search.worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        worker, self._count = self._count, self._count + 1
        assert process.stdout is not None
        self._processes[worker], self._partial[worker] = process, b""
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self.send(worker, self._setup.to_json())
        return worker

    def send(self, worker: int, line: str) -> None:
        if (process := self._processes.get(worker)) is None:
            return  # it died, which `receive` tells next
        pipe = process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which `receive` tells
            pipe.write(line.encode() + b"\n")
            pipe.flush()

    def receive(self, timeout_s: float) -> tuple[int, str | None] | None:
        deadline = time.monotonic() + timeout_s
        while not self._heard:
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            for key, _ in ready:
                self._read(key.data, key.fd)
        return self._heard.popleft()

    def _read(self, worker: int, pipe: int) -> None:
        data = os.read(pipe, 1 << 16)
        *lines, self._partial[worker] = (self._partial[worker] + data).split(b"\n")
        self._heard.extend((worker, line.decode()) for line in lines)
        if not data:
            self._end(worker)
            self._heard.append((worker, None))

    def _end(self, worker: int) -> None:
        process = self._processes.pop(worker)
        assert process.stdout is not None
        assert process.stdin is not None
        self._selector.unregister(process.stdout)
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        process.wait()

    def close(self) -> None:
        for worker in list(self._processes):
            self._end(worker)
        self._selector.close()
