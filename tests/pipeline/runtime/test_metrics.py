"""What whoever watches an edge is told: every frame, refusal and device, whether it lives and whether it is ready."""

import asyncio
import re
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import CoinferError, KeysError
from pipeline.runtime.frame import Kind, pack
from pipeline.runtime.guard import EdgeKeys
from pipeline.runtime.hello import Hello
from pipeline.runtime.lane import Batching
from pipeline.runtime.metrics import MetricsFront
from pipeline.runtime.server import EdgeServer, Limits
from pipeline.runtime.tally import Tally
from pipeline.runtime.transport import TcpTransport, receive_frame
from tests.pipeline.runtime.serving import ask, eventually, frames_of, logits, said


@pytest.fixture
def watch(request):
    """watch(running) -> what is found at a path of its metrics."""

    def start(running, context=None, host="127.0.0.1"):
        ports = []
        front = MetricsFront(host.strip("[]"), 0, ports.append)

        asyncio.run(front.start(running.server))
        request.addfinalizer(lambda: asyncio.run(front.stop(0)))

        def get(path: str) -> str:
            scheme = "https" if context else "http"
            with urllib.request.urlopen(f"{scheme}://{host}:{ports[0]}{path}", timeout=10, context=context) as reply:
                return reply.read().decode()

        return get

    return start


def samples(text: str) -> dict[tuple, float]:
    """By name and the values of the labels, as Prometheus's own parser reads them."""
    return {(sample.name, *sample.labels.values()): sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_every_frame_and_refusal_is_counted(run, make_bundle, watch):
    bundle = make_bundle()
    running, frames, name = run(bundle, limits=Limits(payload_bytes=10_000)), frames_of(bundle, 5), bundle.bundle_id.hex()
    get = watch(running)
    transport = TcpTransport("127.0.0.1", running.port, hello=Hello("ant", "1.2", alone=2))
    transport.alone = 2
    replies = [transport.request(frame) for frame in frames]
    transport.close()
    for reply in replies:
        logits(reply)
    refused = [pack(b"", b"them", Kind.SYMBOLS), pack(b"", bundle.bundle_id, Kind.IMAGE), frames[0][:-1] + b"x"]
    with running.connect() as connection:
        for frame in refused:
            said(ask(connection, frame))
        said(ask(connection, pack(bytes(20_000), bundle.bundle_id, Kind.SYMBOLS)))
    eventually(lambda: not running.server.clients)
    found = samples(get("/metrics"))
    assert found["coinfer_frames_total", name] == found["coinfer_device_frames_total", "ant"] == 5
    assert found["coinfer_device_alone_total", "ant"] == 2
    assert found["coinfer_device_seen_timestamp_seconds", "ant", "1.2"] > 1.7e9
    reasons = {reason: found["coinfer_refusals_total", reason] for reason in ("bundle", "frame", "size", "busy", "rate", "keys", "connections", "failed")}
    assert reasons == {"bundle": 1, "frame": 2, "size": 1, "busy": 0, "rate": 0, "keys": 0, "connections": 0, "failed": 0}
    for part in ("wait", "decode", "edge"):
        assert found["coinfer_part_ms_count", name, part] == 5
        assert 0 <= found["coinfer_part_ms_sum", name, part] < 10_000
    assert found["coinfer_batch_frames_sum", name] == found["coinfer_confidence_count", name] == 5
    assert found["coinfer_confidence_bucket", name, "1.0"] == 5
    assert found["coinfer_bytes_total", "in"] >= sum(map(len, frames + refused))
    assert (found["coinfer_queue_frames", name], found["coinfer_connections",], found["coinfer_ready",]) == (0, 0, 1)
    assert found["process_resident_memory_bytes",] > 1e7


def test_a_checkout_that_is_not_installed_is_of_an_unknown_version(run, make_bundle, watch, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.Distribution.from_name", missing)
    assert samples(watch(run(make_bundle()))("/metrics"))["coinfer_info", "unknown"] == 1


def test_what_a_device_did_alone_is_counted_once_however_bad_the_link(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle), frames_of(bundle, 1)
    devices = running.server.tally.devices
    for count in range(1, 4):
        with running.connect() as connection:
            connection.sendall(Hello("ant", alone=2).pack() + frame[:10])
            eventually(lambda: running.server.tally.bytes["in"] >= count * len(Hello("ant", alone=2).pack() + frame[:10]))  # noqa: B023
    assert devices["ant"].alone == 0
    for hello in (Hello("ant"), Hello("ant", compact=bundle.bundle_id.hex())):
        transport, before = TcpTransport("127.0.0.1", running.port, hello=hello), devices["ant"].alone
        transport.alone = 2
        said(transport.request(pack(b"", bundle.bundle_id, Kind.IMAGE)))
        assert (transport.alone, devices["ant"].alone) == (2, before)
        transport.alone = 3
        for _ in range(2):
            logits(transport.request(frame))
        assert (transport.alone, devices["ant"].alone) == (1, before + 2)
        transport.close()


def test_a_frame_cut_short_is_a_refusal(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle), frames_of(bundle, 1)
    with running.connect() as connection:
        connection.sendall(2 * frame + frame[:-1])
        connection.shutdown(socket.SHUT_WR)
        for _ in range(2):
            logits(receive_frame(connection))
        assert connection.recv(1) == b""
    assert running.server.tally.refusals["frame"] == 1


def test_names_end_in_their_units_and_are_told_once(run, make_bundle, watch):
    text = watch(run(make_bundle()))("/metrics")
    assert len(re.findall("^# HELP coinfer_ready ", text, re.MULTILINE)) == 1
    assert not any(line for line in text.splitlines() if line.startswith("# HELP") and line.endswith(" "))


def test_what_waits_shows_and_a_server_that_drains_is_alive_but_not_ready(run, make_bundle, watch, gate, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.server.SWEEP_S", 0.05)
    bundle = make_bundle()
    running, frames = run(bundle), frames_of(bundle, 3)
    get = watch(running)
    assert (get("/livez"), get("/readyz")) == ("ok\n", "ok\n")
    connections = [running.connect() for _ in frames]
    try:
        for connection, frame in zip(connections, frames, strict=True):
            connection.sendall(frame)
            assert gate.began.wait(10)  # the first runs alone
        eventually(lambda: samples(get("/metrics"))["coinfer_queue_frames", bundle.bundle_id.hex()] == 2)
        running.call(running.server.stop)
        eventually(lambda: running.server.is_stopping)
        assert get("/livez") == "ok\n"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get("/readyz")
        beat_s = running.server.beat_s
        eventually(lambda: running.server.beat_s > beat_s)
    finally:
        gate.is_open.set()
        for connection in connections:
            connection.close()


def test_a_server_that_hangs_is_not_alive(run, make_bundle, watch, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.metrics.BEATS_S", -1.0)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        watch(run(make_bundle()))("/livez")


def test_an_edge_is_watched_over_ipv6_too(run, make_bundle, watch):
    assert watch(run(make_bundle()), host="[::1]")("/livez") == "ok\n"


def test_other_paths_are_told_what_there_is(run, make_bundle, watch):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        watch(run(make_bundle()))("/etc/passwd")


def test_with_keys_only_who_belongs_may_watch(run, make_bundle, watch, key_folder):
    running = run(make_bundle(), keys=key_folder / "edge")
    context = ssl.create_default_context(cafile=str(key_folder / "ca.crt"))
    with pytest.raises((urllib.error.URLError, OSError)):
        watch(running, context)("/metrics")
    context.load_cert_chain(key_folder / "ant/tls.crt", key_folder / "ant/tls.key")
    found = samples(watch(running, context)("/metrics"))
    assert found["coinfer_ready",] == 1
    ends = subprocess.run(["openssl", "x509", "-enddate", "-noout", "-in", key_folder / "edge/tls.crt"], capture_output=True, text=True, check=True).stdout
    assert found["coinfer_certificate_expires_timestamp_seconds",] == ssl.cert_time_to_seconds(ends.strip().removeprefix("notAfter="))


def test_other_machines_watch_only_with_keys(run, make_bundle):
    with pytest.raises(KeysError, match=r"metrics on 0\.0\.0\.0 are reached from other machines"):
        asyncio.run(MetricsFront("0.0.0.0", 0).start(run(make_bundle()).server))


def test_devices_that_make_up_names_fill_no_memory(run, make_bundle):
    running = run(make_bundle())
    running.server.tally.most_devices = 3
    for number in range(10):
        with running.connect() as connection:
            connection.sendall(Hello(f"d{number}").pack())
    eventually(lambda: "d9" in running.server.tally.devices)
    assert list(running.server.tally.devices) == ["d7", "d8", "d9"]


def test_of_too_many_devices_those_that_are_served_are_kept():
    tally = Tally(2)
    for name in ("ant", "bee"):
        tally.hello(Hello(name))
    tally.answered("ant")
    tally.hello(Hello("cat"))
    assert set(tally.devices) == {"ant", "cat"}


def test_devices_with_keys_are_all_kept(key_folder):
    tally = EdgeServer(Batching(), Limits(), EdgeKeys(key_folder / "edge")).tally
    for number in range(1100):
        tally.hello(Hello(f"d{number}"))
    assert len(tally.devices) == 1100


def test_a_port_in_use_is_one_sentence(run, make_bundle):
    running = run(make_bundle())
    with pytest.raises(CoinferError, match="metrics cannot be served"):
        asyncio.run(MetricsFront("127.0.0.1", running.port).start(running.server))
