"""Who may ask an edge, and which edge a device asks: only those whose keys belong together, in time."""

import contextlib
import os
import ssl
import stat
import subprocess

import pytest

from pipeline.errors import CoinferError, FrameError, KeysError
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.dial import dial
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.frame import Kind, pack
from pipeline.runtime.guard import DeviceKeys, EdgeKeys, edge_keys, is_loopback
from pipeline.runtime.hello import Hello
from pipeline.runtime.keymaking import make_keys
from pipeline.runtime.server import Limits
from pipeline.runtime.transport import EdgeUnreachable, TcpTransport, receive_frame
from tests.pipeline.runtime.serving import eventually, frames_of, logits, said


@pytest.fixture
def bundle(make_bundle):
    return make_bundle()


@pytest.fixture
def to(request):
    """to(running, keys of a device) -> transport, closed with the test."""

    def connect(running, keys, **arguments) -> TcpTransport:
        transport = dial(f"127.0.0.1:{running.port}", keys, **arguments)
        request.addfinalizer(transport.close)
        return transport

    return connect


@pytest.mark.parametrize("compact", [False, True])
def test_a_device_with_its_keys_is_answered(run, bundle, key_folder, to, picture, compact):
    transport = to(run(bundle, keys=key_folder / "edge"), key_folder / "ant", compact=bundle.bundle_id if compact else b"")
    device = DeviceHalf(bundle)
    for _ in range(3):
        answer = device.classify(picture, transport)
    whole = len(device.run(picture)[0])
    assert (answer.path, answer.frame_bytes) == ("split", whole - 7 * compact + 22)


def test_nobody_gets_in_without_a_certificate(run, bundle, key_folder):
    running, [frame] = run(bundle, keys=key_folder / "edge"), frames_of(bundle, 1)
    context = ssl.create_default_context(cafile=str(key_folder / "ca.crt"))
    for secured in (lambda plain: plain, lambda plain: context.wrap_socket(plain, server_hostname="localhost")):
        with running.connect() as plain, secured(plain) as connection, contextlib.suppress(OSError):
            connection.sendall(frame)
            assert connection.recv(1) in (b"", b"\x15")  # nothing, or an alert of TLS
    assert not running.server.tally.served


def test_a_certificate_of_another_authority_is_refused_on_both_sides(run, bundle, key_folder, to, tmp_path, picture):
    make_keys(tmp_path / "other", ["edge.example"], ["ant"])
    running = run(bundle, keys=key_folder / "edge")
    with pytest.raises(EdgeUnreachable, match=r"do not trust each other .*certificate"):
        DeviceHalf(bundle).classify(picture, to(running, tmp_path / "other/ant"))
    (tmp_path / "other/ant/ca.crt").write_bytes((key_folder / "ca.crt").read_bytes())  # that device trusts the edge, not the other way round
    with pytest.raises(EdgeUnreachable):
        DeviceHalf(bundle).classify(picture, to(running, tmp_path / "other/ant"))
    assert not running.server.tally.served


def test_expired_certificates_are_refused_on_both_sides(run, bundle, key_folder, to, picture, capsys):
    running = run(bundle, keys=key_folder / "edge")
    make_keys(key_folder, [], ["ant"], days=0)
    ant = to(running, key_folder / "ant")
    assert capsys.readouterr().err.endswith("ant/tls.crt (certificate has expired); make another with `coinfer keys`.\n")
    with pytest.raises(EdgeUnreachable):
        DeviceHalf(bundle).classify(picture, ant)
    make_keys(key_folder, ["edge.example"], [], days=0)
    with pytest.raises(KeysError, match=r"no device would take .*edge/tls\.crt \(certificate has expired\)"):
        EdgeKeys(key_folder / "edge")
    running.server.keys.context.load_cert_chain(key_folder / "edge/tls.crt", key_folder / "edge/tls.key")  # as if it had expired meanwhile
    with pytest.raises(EdgeUnreachable, match=r"do not trust each other .*expired"):
        DeviceHalf(bundle).classify(picture, to(running, key_folder / "bee"))
    assert not capsys.readouterr().err


def test_a_device_is_no_edge(run, bundle, key_folder, to, picture):
    """Whoever steals a camera can not stand in for the edge."""
    with pytest.raises(KeysError, match="unsuitable certificate purpose"):
        EdgeKeys(key_folder / "ant")
    running = run(bundle, keys=key_folder / "edge")
    running.server.keys.context.load_cert_chain(key_folder / "ant/tls.crt", key_folder / "ant/tls.key")
    with pytest.raises(EdgeUnreachable, match="do not trust each other"):
        DeviceHalf(bundle).classify(picture, to(running, key_folder / "bee"))


def test_an_edge_of_another_name_is_refused(run, bundle, key_folder):
    running, keys = run(bundle, keys=key_folder / "edge"), DeviceKeys(key_folder / "ant")
    with running.connect() as connection, pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        keys.context.wrap_socket(connection, server_hostname="elsewhere.example")


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (None, "wants a token"),
        (Hello("ant"), "wants a token"),
        (Hello("ant", token="guess"), "none of this edge's"),
        (Hello("bee", token="ant's"), "token is ant's, not bee's"),
        (Hello(token="ant's"), "token is ant's, not of a device without a name's"),
    ],
)
def test_a_certificate_is_not_enough_without_the_right_token(run, bundle, key_folder, hello, why, picture):
    keys = DeviceKeys(key_folder / "ant")
    if hello and hello.token == "ant's":
        hello = Hello(hello.device, token=keys.token)
    running = run(bundle, keys=key_folder / "edge")
    transport = TcpTransport("127.0.0.1", running.port, hello=hello, tls=keys.context)
    with pytest.raises(FrameError, match=why):
        DeviceHalf(bundle).classify(picture, transport)
    transport.close()
    assert running.server.tally.refusals["keys"] == 1
    assert not running.server.tally.served


def test_a_token_is_not_enough_without_its_devices_certificate(run, bundle, key_folder, picture):
    ant, bee = DeviceKeys(key_folder / "ant"), DeviceKeys(key_folder / "bee")
    running = run(bundle, keys=key_folder / "edge")
    transport = TcpTransport("127.0.0.1", running.port, hello=Hello("ant", token=ant.token), tls=bee.context)
    with contextlib.closing(transport), pytest.raises(FrameError, match="certificate is that of 'bee', not of ant"):
        DeviceHalf(bundle).classify(picture, transport)
    assert not running.server.tally.served


def test_devices_are_let_in_and_shut_out_while_the_edge_runs(run, bundle, key_folder, to, picture, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.server.SWEEP_S", 0.05)
    running, device = run(bundle, keys=key_folder / "edge"), DeviceHalf(bundle)
    ant = to(running, key_folder / "ant")
    device.classify(picture, ant)
    make_keys(key_folder, [], ["cat"])
    device.classify(picture, to(running, key_folder / "cat"))
    tokens = key_folder / "edge/tokens"
    tokens.write_text("".join(line for line in tokens.read_text().splitlines(keepends=True) if not line.startswith("ant ")))
    eventually(lambda: running.server.tally.refusals["keys"])
    ant.close()
    with pytest.raises(FrameError, match="none of this edge's"):
        device.classify(picture, ant)
    device.classify(picture, to(running, key_folder / "bee"))


def test_broken_tokens_change_nothing_until_they_are_mended(key_folder, capsys):
    keys, ant = EdgeKeys(key_folder / "edge"), DeviceKeys(key_folder / "ant")
    hello, tokens = Hello("ant", token=ant.token), key_folder / "edge/tokens"
    good = tokens.read_text()
    tokens.write_text("ant")
    assert keys.refuses(hello, "ant") is None
    assert "line 1, is no NAME SHA256" in capsys.readouterr().err
    tokens.unlink()
    assert keys.refuses(hello, "ant") is None
    assert capsys.readouterr().err.count("\n") == 1
    assert keys.refuses(hello, "ant") is None
    assert not capsys.readouterr().err
    tokens.write_text("# nobody\n" + good.replace("ant", "eel"))
    assert keys.refuses(hello, "ant") is not None


def test_tokens_are_read_again_even_where_size_and_date_are_as_before(key_folder):
    keys, ant = EdgeKeys(key_folder / "edge"), DeviceKeys(key_folder / "ant")
    hello, tokens = Hello("ant", token=ant.token), key_folder / "edge/tokens"
    assert keys.refuses(hello, "ant") is None
    before = tokens.stat()
    tokens.write_text(tokens.read_text().replace("ant", "eel"))
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert keys.refuses(hello, "ant") is not None


def test_a_client_that_never_shakes_hands_is_let_go(run, bundle, key_folder, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.connection.HANDSHAKE_S", 0.2)
    with run(bundle, keys=key_folder / "edge").connect() as connection, contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def test_silent_connections_count_before_they_shake_hands(run, bundle, key_folder, to):
    running, [frame] = run(bundle, limits=Limits(connections=3), keys=key_folder / "edge"), frames_of(bundle, 1)
    ant = to(running, key_folder / "ant")
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(running.connect()) for _ in range(4)]
        assert silent[3].recv(1) == b""
        assert len(running.server.clients) == 3
        with pytest.raises(EdgeUnreachable, match=r"does not answer \((it closed the connection|.*reset by peer)\)"):
            ant.request(frame)
        assert running.server.tally.refusals["connections"] == 2
    eventually(lambda: not running.server.clients)
    logits(ant.request(frame))
    with running.connect() as silent_still:
        eventually(lambda: len(running.server.clients) == 2)
        running.call(running.server.stop)
        assert silent_still.recv(1) == b""


def test_frames_that_come_with_the_end_of_the_handshake_are_answered(run, bundle, key_folder):
    running, frames, keys = run(bundle, limits=Limits(payload_bytes=10_000), keys=key_folder / "edge"), frames_of(bundle, 300), DeviceKeys(key_folder / "ant")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = keys.context.wrap_bio(there, back, server_hostname="localhost")
    with running.connect() as connection:

        def until_done(step):
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    connection.sendall(back.read())
                    there.write(connection.recv(1 << 16))

        until_done(tls.do_handshake)
        tls.write(Hello("ant", token=keys.token).pack() + b"".join(frames))
        connection.sendall(back.read())
        size = len(EdgeHalf(bundle).handle(frames[0])[0])
        found = b""
        while len(found) < size * len(frames):
            found += until_done(lambda: tls.read(1 << 16))
    assert [logits(found[place : place + size]).shape for place in range(0, len(found), size)] == [(3,)] * len(frames)


def test_limits_are_per_device_with_keys_and_not_per_address(run, bundle, key_folder, to):
    running, [frame] = run(bundle, limits=Limits(per_second=3), keys=key_folder / "edge"), frames_of(bundle, 1)
    ant, bee = to(running, key_folder / "ant"), to(running, key_folder / "bee")
    for _ in range(3):
        logits(ant.request(frame))
    assert "3 frames a second" in said(ant.request(frame))
    logits(bee.request(frame))


def test_an_edge_without_keys_takes_frames_and_hellos_as_they_come(run, bundle):
    running, [frame] = run(bundle), frames_of(bundle, 1)
    greeting = Hello("ant", "1.0", compact=bundle.bundle_id.hex(), alone=3).pack()
    with running.connect() as connection:
        for byte in greeting:
            connection.sendall(bytes([byte]))
    with running.connect() as connection:
        connection.sendall(greeting.replace(b"ant", b"a!t"))
        assert "called 'a!t'" in said(receive_frame(connection))
    with running.connect() as connection:
        connection.sendall(b"\xc2\xff\xff")
        assert "too long" in said(receive_frame(connection))
    transport = TcpTransport("127.0.0.1", running.port, hello=Hello("bee", compact=bundle.bundle_id.hex()))
    logits(transport.request(frame))
    assert said(transport.request(pack(b"", bundle.bundle_id, Kind.IMAGE)))
    transport._socket.sendall(b"\x00\x00bad!")
    with running.connect() as connection:
        connection.sendall(Hello("cat", compact=bundle.bundle_id.hex()).pack() + b"\x00\x00bad!")
        assert connection.recv(100).startswith(b"\xc0")  # refused in the profile that was asked for
    transport.close()
    devices = running.server.tally.devices
    assert (devices["ant"].version, devices["ant"].alone, devices["bee"].answered) == ("1.0", 0, 1)
    assert devices["ant"].answered == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "edge.example"])
def test_an_edge_listens_to_other_machines_only_with_keys(host):
    assert not is_loopback(host)
    with pytest.raises(KeysError, match="is reached from other machines, which needs keys"):
        edge_keys(None, host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert edge_keys(None, host) is None


@pytest.mark.parametrize("side", [EdgeKeys, DeviceKeys])
@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key", "token"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"nothing of use"])
def test_keys_that_cannot_be_used_are_one_sentence(key_folder, side, name, content):
    folder = key_folder / ("edge" if side is EdgeKeys else "ant")
    path = folder / (name if name != "token" else {EdgeKeys: "tokens", DeviceKeys: "token"}[side])
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if path.name == "tokens" and content == b"":
        assert EdgeKeys(folder).refuses(Hello("ant", token="any"), "ant")
        return
    with pytest.raises(KeysError, match=r"^[^\n]*coinfer keys[^\n]*$"):
        side(folder)


def test_a_key_with_a_password_is_not_asked_for(key_folder):
    path = key_folder / "ant/tls.key"
    arguments = ["openssl", "pkcs8", "-topk8", "-in", path, "-passout", "pass:secret"]
    path.write_bytes(subprocess.run(arguments, capture_output=True, check=True).stdout)
    with pytest.raises(KeysError, match="cannot be used"):
        DeviceKeys(key_folder / "ant")


def test_nobody_else_can_read_the_secrets(key_folder):
    for path in (key_folder / "ca.key", key_folder / "edge/tls.key", key_folder / "edge/tokens", key_folder / "ant/tls.key", key_folder / "ant/token"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600, path
    (key_folder / f"ant/.tls.key.{os.getpid()}.tmp").touch(0o644)  # left by a run that was killed
    make_keys(key_folder, [], ["ant"])
    assert stat.S_IMODE(os.stat(key_folder / "ant/tls.key").st_mode) == 0o600
    token = DeviceKeys(key_folder / "ant").token
    assert len(token) >= 43
    assert token not in (key_folder / "edge/tokens").read_text()


def test_openssl_agrees_with_the_certificates(key_folder):
    for name, purpose in (("edge", "sslserver"), ("ant", "sslclient")):
        arguments = ["openssl", "verify", "-x509_strict", "-CAfile", key_folder / "ca.crt", "-purpose", purpose, key_folder / name / "tls.crt"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_keys_are_added_to_what_is_there(key_folder):
    before = {path: path.read_bytes() for path in key_folder.rglob("*") if path.is_file()}
    assert make_keys(key_folder, [], ["cat"]) == [key_folder / "cat"]
    changed = {path for path, data in before.items() if path.read_bytes() != data}
    assert changed == {key_folder / "edge/tokens"}
    assert [line.split()[0] for line in (key_folder / "edge/tokens").read_text().splitlines()] == ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("edge", "devices", "match"),
    [
        ([], ["ant"], "no keys of an edge yet"),
        (["edge.example:7070"], ["ant"], "no name or address"),
        (["a" * 70 + ".example"], [], "no name or address"),
        (["0.0.0.0"], ["ant"], "where an edge listens"),
        (["edge.example", "::"], ["ant"], "where an edge listens"),
        (["edge.example"], ["two words"], "cannot be called"),
        (["edge.example"], ["../ant"], "cannot be called"),
        (["edge.example"], ["edge"], "cannot be called"),
        (["edge.example"], ["ant", "ca.crt"], "cannot be called 'ca.crt'"),
        (["edge.example"], ["ca.key"], "cannot be called 'ca.key'"),
        ([], [], "no keys to make"),
    ],
)
def test_names_that_cannot_be_used_make_nothing(tmp_path, edge, devices, match):
    with pytest.raises(KeysError, match=match):
        make_keys(tmp_path / "keys", edge, devices)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("what", ["random bytes", "a folder", "another list"])
def test_tokens_that_cannot_be_read_change_nothing(key_folder, what):
    tokens = key_folder / "edge/tokens"
    tokens.unlink()
    if what == "a folder":
        tokens.mkdir()
    else:
        tokens.write_bytes(b"ant bee\n" if what == "another list" else b"\xff\xfe\x00ant")
    before = {path: path.read_bytes() for path in key_folder.rglob("*") if path.is_file()}
    with pytest.raises(KeysError, match=r"^[^\n]*edge/tokens[^\n]*keys again with `coinfer keys`\.$"):
        make_keys(key_folder, ["elsewhere.example"], ["cat"])
    assert {path: path.read_bytes() for path in key_folder.rglob("*") if path.is_file()} == before


def test_keys_with_nothing_to_make_are_left_as_they_are(key_folder):
    with pytest.raises(KeysError, match="no keys to make; say with --edge"):
        make_keys(key_folder, [], [])


def test_a_broken_authority_is_not_replaced(key_folder):
    (key_folder / "ca.key").write_text("nothing of use")
    with pytest.raises(KeysError, match="restore it"):
        make_keys(key_folder, [], ["cat"])
    assert not (key_folder / "cat").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "keys").touch()
    with pytest.raises(CoinferError, match="cannot write"):
        make_keys(tmp_path / "keys", ["edge.example"], [])
