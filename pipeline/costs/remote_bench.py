"""A bench on another machine: what is to be timed goes to the profile agent there."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pipeline.errors import ProfileError
from pipeline.runtime.address import parse_address
from pipeline.runtime.bench import Repeats, Samples, Work
from pipeline.runtime.bench_wire import Message, receive, replied, request, send

CONNECT_TIMEOUT_S = 10.0
REPLY_TIMEOUT_S = 1800.0  # a small device takes minutes for the models of one request


class RemoteBench:
    """The machine at `address`, HOST:PORT, where `coinfer profile-agent` runs; it serves nobody else until this is closed.

    Raises:
        ParamsError: `address` is not of that form.
    """

    def __init__(self, address: str) -> None:
        self.address, self._to = address, parse_address(address, "192.168.1.20:7071")
        self._connection: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def describe(self) -> dict[str, Any]:
        """See `Bench`; the agent is free for others again afterwards, as there may be much to prepare before there is something to measure.

        Raises:
            ProfileError: nobody answers there, or no profile agent does.
        """
        fields, _ = self._ask(({"ask": "describe"}, b""))
        self.close()
        if "error" in fields:
            raise ProfileError(f"the profile agent at {self.address} refuses: {fields['error']}")
        machine = fields.get("machine")
        if not isinstance(machine, dict) or not {"runtime", "coder"} <= fields.keys():
            raise ProfileError(f"what answers at {self.address} does not describe a machine; check that it is a profile agent of the same version.")
        return {"machine": {str(key): str(value) for key, value in machine.items()}, "runtime": str(fields["runtime"]), "coder": str(fields["coder"])}

    def measure(self, jobs: Sequence[Work], repeats: Repeats, beside: bytes | None = None) -> list[Samples]:
        """See `Bench`.

        Raises:
            ProfileError: the agent refuses, is gone, or does not answer what was asked.
        """
        fields, blob = self._ask(request(jobs, repeats, beside))
        if "error" in fields:
            self.close()
            raise ProfileError(f"the profile agent at {self.address} refuses: {fields['error']}")
        found = replied(fields, blob)
        if len(found) != len(jobs):
            raise ProfileError(f"the profile agent at {self.address} answered {len(found)} of {len(jobs)} jobs; check that it is of the same version.")
        return found

    def _ask(self, message: Message) -> Message:
        kept = self._connection is not None
        try:
            try:
                return self._exchange(message)
            except ConnectionError:
                if not kept:
                    raise
                return self._exchange(message)  # while halves are exported the agent may have tired of waiting
        except OSError as error:
            raise ProfileError(f"no profile agent answers at {self.address} ({error}); start it there with `coinfer profile-agent --host 0.0.0.0`.") from error

    def _exchange(self, message: Message) -> Message:
        try:
            if self._connection is None:
                self._connection = socket.create_connection(self._to, CONNECT_TIMEOUT_S)
                self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connection.settimeout(REPLY_TIMEOUT_S)
            send(self._connection, *message)
            answer = receive(self._connection)
            if answer is None:
                raise ConnectionResetError("it closed the connection")
        except BaseException:
            self.close()  # whatever is still under way would be taken for the next reply
            raise
        return answer
