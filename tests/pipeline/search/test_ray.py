"""Search over a real Ray cluster: a head and two worker nodes, each a process tree of its own."""

import compileall
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.errors import CoinferError
from pipeline.search.executor import Pool
from pipeline.search.ray_fleet import RayFleet
from tests.pipeline.search.fakes import run, setup

ray = pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),  # ray leaves its sockets and logs open
    pytest.mark.filterwarnings("ignore:Tip.*RAY_ACCEL_ENV_VAR:FutureWarning"),
]
ROOT = Path(__file__).resolve().parents[3]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """Address of the head, which has no CPU for actors; both other nodes have one."""
    compileall.compile_dir(Path(ray.__file__).parent, quiet=2)  # after a fresh install each of the nodes would, and end for being slow
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_DASHBOARD": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "300"}  # a node whose agent starts slowly ends itself
    memory = ["--object-store-memory", "80000000", "--block"]
    head = [
        "--head",
        "--num-cpus",
        "0",
        "--port",
        address.split(":")[1],
        "--include-dashboard",
        "false",
        "--temp-dir",
        folder,
        "--node-ip-address",
        "127.0.0.1",
    ]
    commands = [head, *([["--address", address, "--num-cpus", "1"]] * 2)]
    nodes = []
    try:
        for command in commands:
            with (Path(folder) / f"start-{len(nodes)}.log").open("w") as log:
                nodes.append(subprocess.Popen([RAY, "start", *command, *memory], env=environment, stdout=log, stderr=log, start_new_session=True))
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not answers(address):
                time.sleep(0.1)
        if not joined(address, 2):
            pytest.skip("the nodes of a Ray cluster do not start here within two minutes")
        yield address
    finally:
        for node in nodes[::-1]:
            os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            try:
                node.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()


def joined(address, cpus):
    """Whether the nodes of the cluster come to have so many CPUs."""
    deadline = time.monotonic() + 120
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        while time.monotonic() < deadline:
            if ray.cluster_resources().get("CPU") == cpus:
                return True
            time.sleep(0.5)
        return False
    finally:
        ray.shutdown()


def answers(address):
    try:
        socket.create_connection(address.split(":"), 1).close()
    except OSError:
        return False
    return True


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
        RayFleet(setup("plain"), address.format(port=free_port()))
