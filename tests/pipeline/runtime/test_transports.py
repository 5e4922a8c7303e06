import pytest

from pipeline.errors import ParamsError
from pipeline.runtime.grpc_transport import GrpcTransport
from pipeline.runtime.transport import TcpTransport
from pipeline.runtime.transports import transport_to


@pytest.mark.parametrize(("address", "kind"), [("127.0.0.1:7070", TcpTransport), ("tcp://[::1]:7070", TcpTransport), ("grpc://edge.local:8001", GrpcTransport)])
def test_the_address_says_which_transport(address, kind):
    assert isinstance(transport_to(address), kind)


@pytest.mark.parametrize(
    ("address", "reason"),
    [("http://edge:1", "neither tcp nor grpc"), ("grpc://edge", "is not HOST:PORT"), ("grpc://", "is not HOST:PORT"), ("edge", "is not HOST:PORT")],
)
def test_an_address_that_names_no_transport_is_refused(address, reason):
    with pytest.raises(ParamsError, match=reason):
        transport_to(address)
