import socket
import threading

import pytest

from pipeline.costs.link import Link
from pipeline.errors import FrameError
from pipeline.runtime.frame import Kind, pack
from pipeline.runtime.transport import EdgeUnreachable, EmulatedLink, LoopbackTransport, RealClock, TcpTransport

ID = b"\1\2\3\4"
LINK = Link(rate_mbps=0.1, rtt_ms=10)


class FakeClock:
    """Stands still but for waiting."""

    def __init__(self) -> None:
        self.time_ms = 0.0

    def now_ms(self) -> float:
        return self.time_ms

    def wait_until_ms(self, moment_ms: float) -> None:
        self.time_ms = max(self.time_ms, moment_ms)


class Echo:
    """Answers any frame with 100 bytes on the wire."""

    def __init__(self) -> None:
        self.reply = pack(bytes(35), ID, Kind.REPLY)

    def handle(self, frame: bytes) -> tuple[bytes, dict[str, float]]:
        return self.reply, {}


@pytest.fixture
def listener():
    """listener(answers) -> port: accepts connections one after another and gives each its own list of answers, None to close early."""
    opened = []

    def start(*connections: list[bytes]) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        opened.append(server)

        def run() -> None:
            for answers in connections:
                peer, _ = server.accept()
                with peer:
                    for answer in answers:
                        peer.recv(1 << 16)
                        peer.sendall(answer)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return server.getsockname()[1]

    yield start
    for server in opened:
        server.close()


def test_a_lone_frame_of_100_wire_bytes_takes_exactly_8_ms_and_half_a_round_trip():
    clock = FakeClock()
    EmulatedLink(LINK, clock).up(48)  # 48 bytes and 52 of TCP/IP headers
    assert clock.time_ms == 8 * 100 / 100 + 10 / 2


def test_a_second_frame_waits_for_the_first():
    clock = FakeClock()
    link = EmulatedLink(LINK, clock)
    link.up(48)
    clock.time_ms = 1.0  # both handed over while the first is still on the wire
    link.up(48)
    assert clock.time_ms == 8 + 8 + 5


def test_the_two_directions_do_not_wait_for_each_other():
    clock = FakeClock()
    link = EmulatedLink(LINK, clock)
    link.up(48)
    clock.time_ms = 0.0
    link.down(48)
    assert clock.time_ms == 13


def test_a_request_over_tcp_is_held_back_both_ways(listener):
    clock = FakeClock()
    transport = TcpTransport("127.0.0.1", listener([Echo().reply]), LINK, clock)
    assert transport.request(pack(bytes(35), ID, Kind.SYMBOLS)) == Echo().reply
    assert clock.time_ms == 13 + 13
    transport.close()


def test_a_request_in_process_is_held_back_both_ways():
    clock = FakeClock()
    assert LoopbackTransport(Echo(), LINK, clock).request(pack(bytes(35), ID, Kind.SYMBOLS)) == Echo().reply
    assert clock.time_ms == 26


def test_the_real_clock_waits_to_the_moment_and_not_before():
    clock = RealClock()
    moment_ms = clock.now_ms() + 3
    clock.wait_until_ms(moment_ms)
    assert clock.now_ms() >= moment_ms


def test_one_connection_serves_many_requests_and_is_opened_again_when_dropped(listener):
    reply = Echo().reply
    transport = TcpTransport("127.0.0.1", listener([reply, reply], [reply]))
    assert [transport.request(reply) for _ in range(3)] == [reply] * 3
    transport.close()


def test_an_edge_that_is_not_there_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(EdgeUnreachable, match=f"edge 127.0.0.1:{port} does not answer"):
        TcpTransport("127.0.0.1", port).request(b"frame")


def test_an_edge_that_hangs_up_is_unreachable(listener):
    reply = Echo().reply
    transport = TcpTransport("127.0.0.1", listener([b""]))
    with pytest.raises(EdgeUnreachable, match="closed the connection"):
        transport.request(reply)
    transport = TcpTransport("127.0.0.1", listener([reply[:20]]))
    with pytest.raises(EdgeUnreachable, match="inside a frame"):
        transport.request(reply)


def test_an_edge_that_talks_something_else_is_refused(listener):
    transport = TcpTransport("127.0.0.1", listener([b"HTTP/1.1 400 Bad Request\r\n\r\n"]))
    with pytest.raises(FrameError, match="not coinfer"):
        transport.request(Echo().reply)
