"""What an address and keys lead to."""

import pytest

from pipeline.errors import KeysError, ParamsError
from pipeline.runtime.dial import dial
from pipeline.runtime.grpc_transport import GrpcTransport
from pipeline.runtime.transport import TcpTransport


@pytest.mark.parametrize(("address", "kind"), [("127.0.0.1:7070", TcpTransport), ("tcp://localhost:7070", TcpTransport), ("grpc://[::1]:8001", GrpcTransport)])
def test_an_address_says_which_transport(address, kind):
    assert type(dial(address)) is kind


def test_another_transport_is_refused():
    with pytest.raises(ParamsError, match="neither tcp nor grpc"):
        dial("http://edge:1")


def test_grpc_cannot_be_compact():
    with pytest.raises(ParamsError, match="cannot be compact"):
        dial("grpc://127.0.0.1:8001", compact=b"abcd")


@pytest.mark.parametrize(
    "address", ["", "edge", "edge:", ":7070", "edge:0", "edge:65536", "edge:http", "a..b:7070", "edge:" + 5_000 * "1", "grpc://edge", "grpc://"]
)
def test_an_address_that_is_no_host_and_port_is_refused(address):
    with pytest.raises(ParamsError, match="is not HOST:PORT"):
        dial(address)


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]", "edge.example", "0.0.0.0"])
def test_nothing_is_sent_to_another_machine_without_keys(host):
    with pytest.raises(KeysError, match="another machine, which needs keys"):
        dial(f"{host}:7070")


@pytest.mark.parametrize("name", ["", "two words", "-x", "é", "x" * 65])
def test_a_name_that_cannot_be_one_is_refused(name):
    with pytest.raises(ParamsError, match="cannot be called"):
        dial("127.0.0.1:7070", name=name)
