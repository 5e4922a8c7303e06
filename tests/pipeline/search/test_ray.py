"""Search over a real Ray cluster: a head and two worker nodes, each a process tree of its own."""

import json
import os
import signal
import socket
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.errors import CoinferError
from pipeline.search.executor import Pool
from pipeline.search.ray_fleet import RayFleet
from tests.pipeline.search.fakes import run, setup

ray = pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
ray_cluster = pytest.importorskip("benchmarks.ray_cluster", reason="ray is not installed (extra `cluster`)")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),  # ray leaves its sockets and logs open
    pytest.mark.filterwarnings("ignore:Tip.*RAY_ACCEL_ENV_VAR:FutureWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster of two nodes with a CPU each."""
    with ExitStack() as stack:
        try:
            address = stack.enter_context(ray_cluster.ray_cluster(cpus=1))
        except TimeoutError as error:
            pytest.skip(str(error))
        yield address


def test_a_cluster_gives_the_table_of_one_process_also_when_a_worker_is_killed(cluster, tmp_path):
    log = tmp_path / "log"
    pool = Pool(RayFleet(setup("slow", seconds=0.1, log=str(log)), cluster), 2)
    killed = []

    class Watched:
        workers = 2

        def submit(self, job):
            pool.submit(job)

        def next(self):
            if not killed and log.exists() and len(log.read_text().splitlines()) > 8:
                killed.append(int(log.read_text().splitlines()[-1].split()[0]))
                os.kill(killed[0], signal.SIGKILL)
            return pool.next()

        def close(self):
            pool.close()

    assert run(tmp_path / "two", method="random", trials=12, executor=Watched()) == run(tmp_path / "one", method="random", trials=12)
    assert killed
    evaluations = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert {int(pid) for pid, _ in evaluations} > set(killed), "others went on"
    again = {json.dumps(what) for _, what in evaluations if [w for _, w in evaluations].count(what) > 1}
    assert len(again) <= 1


def test_more_workers_than_the_cluster_has_cpus_do_with_what_there_is(cluster, tmp_path):
    table = run(tmp_path / "three", method="random", trials=6, executor=Pool(RayFleet(setup("plain"), cluster), 3))
    assert table == run(tmp_path / "one", method="random", trials=6)


def test_a_folder_that_the_cluster_does_not_have_is_one_sentence(cluster, tmp_path, monkeypatch):
    fleet = RayFleet(setup("plain"), cluster)
    monkeypatch.setattr("os.getcwd", lambda: str(tmp_path / "elsewhere"))
    with pytest.raises(CoinferError, match=r"elsewhere cannot be used on .* of the Ray cluster \(No such file or directory\); share the folder"):
        run(tmp_path, executor=Pool(fleet, 1))


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "nowhere", "127.0.0.1:99999999"])
def test_an_address_that_nobody_answers_at_is_one_sentence(address):
    with pytest.raises(CoinferError, match=r"nobody answers at search\.ray_address .*; start a Ray cluster there, or correct the address"):
        RayFleet(setup("plain"), address.format(port=ray_cluster.free_port()))


@pytest.fixture(params=["web server", "silence"])
def other(request):
    """Address of something that is not Ray."""
    if request.param == "silence":
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        return

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


NO_HEAD = r"what answers at search\.ray_address .* is no head of a Ray cluster; give the port of `ray start --head --port=PORT`"


def test_something_else_at_the_address_is_one_sentence(other, monkeypatch):
    monkeypatch.setattr("pipeline.search.ray_fleet.ANSWER_TIMEOUT_S", 0.5)
    with pytest.raises(CoinferError, match=NO_HEAD):
        RayFleet(setup("plain"), other)


def test_another_port_of_the_cluster_is_one_sentence(cluster):
    """A node speaks as the head does, and answers other questions."""
    ray.init(address=cluster, logging_level="ERROR", log_to_driver=False)
    port = ray.nodes()[0]["NodeManagerPort"]
    ray.shutdown()
    with pytest.raises(CoinferError, match=NO_HEAD):
        RayFleet(setup("plain"), f"127.0.0.1:{port}")


def test_auto_is_the_cluster_that_ray_is_told_of(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    table = run(tmp_path / "auto", method="random", trials=2, executor=Pool(RayFleet(setup("plain"), "auto"), 1))
    assert table == run(tmp_path / "one", method="random", trials=2)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{ray_cluster.free_port()}")
    with pytest.raises(CoinferError, match=r"nobody answers at search\.ray_address"):
        RayFleet(setup("plain"), "auto")
