"""The built wheel in an empty environment: what a Raspberry Pi gets. Also how the device command ends there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.runtime_start import build_wheel, edge_program, uv
from pipeline.runtime.coder import HAVE_C
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.records import classify
from pipeline.runtime.transport import LoopbackTransport

SAME = ("file", "label", "probability", "path", "frame_bytes")
CODER = "import importlib.util as there; assert not there.find_spec('torch'); from pipeline.runtime.coder import HAVE_C; print(HAVE_C)"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("install")
    uv("venv", "--python", sys.executable, folder / "env")
    python = folder / "env/bin/python"
    uv("pip", "install", "--python", python, build_wheel(folder / "wheel"))
    return python


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number, (width, height, mode) in enumerate([(8, 8, "RGB"), (61, 47, "RGB"), (20, 90, "L"), (33, 8, "RGBA"), (9, 9, "RGB"), (16, 30, "P")]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(mode).save(folder / f"{number}.png")
    return folder


def device(python: Path, bundle, source, *options, cwd: Path, **streams) -> subprocess.Popen:
    left_out = ("PYTHON", "XDG_", "ORT_", "CI")  # so that it is a user's environment, with bytecode, and reports home if ever it does
    env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | {"HOME": str(cwd / "home")}
    command = [python.with_name("coinfer"), "device", "--bundle", bundle.path, "--source", source, *options]
    return subprocess.Popen(command, cwd=cwd, env=env, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams))


def records(python: Path, bundle, source, *options, cwd: Path) -> list[dict]:
    with device(python, bundle, source, *options, cwd=cwd) as running:
        out, err = running.communicate()
    assert (running.returncode, err) == (0, b"")
    return [json.loads(line) for line in out.splitlines()]


def told(found) -> list[list]:
    return [[record[name] for name in SAME] for record in found]


def test_it_classifies_as_the_checkout_does(python, make_bundle, photos, tmp_path):
    bundle = make_bundle()
    alone, split = (told(classify(bundle, edge, str(photos), deadline_ms=60_000)) for edge in (None, LoopbackTransport(EdgeHalf(bundle))))
    assert len({label for _, label, *_ in alone + split}) > 1
    assert told(records(python, bundle, photos, cwd=tmp_path)) == alone
    with edge_program([python.with_name("coinfer")], bundle.path) as address:
        assert told(records(python, bundle, photos, "--edge", address, "--deadline", "60000", cwd=tmp_path)) == split
    assert not (tmp_path / "home").exists(), "something keeps a device id there"


def test_it_has_the_coder_that_the_checkout_has_and_without_a_compiler_the_one_in_python(python, make_bundle, photos, tmp_path):
    def has_c(there: Path) -> str:
        return subprocess.run([there, "-c", CODER], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert has_c(python) == str(HAVE_C)
    uv("venv", "--python", sys.executable, tmp_path / "env")
    bare = tmp_path / "env/bin/python"
    uv("pip", "install", "--python", bare, build_wheel(tmp_path / "wheel", CC="false"))
    assert has_c(bare) == "False"
    bundle = make_bundle()
    with edge_program([python.with_name("coinfer")], bundle.path) as address:  # one half with the coder in C, the other with the one in Python
        found = told(records(bare, bundle, photos, "--edge", address, "--deadline", "60000", cwd=tmp_path))
    assert found == told(classify(bundle, LoopbackTransport(EdgeHalf(bundle)), str(photos), deadline_ms=60_000))


@pytest.fixture
def classifying(python, make_bundle, photos, tmp_path):
    """A device that has answered for one image and waits for the next."""
    with device(python, make_bundle(), "stdin", cwd=tmp_path, stdin=subprocess.PIPE) as running:
        Image.open(photos / "1.png").save(running.stdin, "JPEG")
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["frame"] == 0
        yield running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_systemd_end_it_without_a_word(classifying, number):
    classifying.send_signal(number)
    assert classifying.wait(20) == -number
    assert classifying.stdout.read() + classifying.stderr.read() == b""


def test_it_ends_without_a_word_when_nobody_reads_on(classifying, photos):
    classifying.stdout.close()
    Image.open(photos / "1.png").save(classifying.stdin, "JPEG")
    classifying.stdin.flush()
    assert classifying.wait(20) == 128 + signal.SIGPIPE
    assert classifying.stderr.read() == b""


def test_a_full_disk_is_one_sentence(python, make_bundle, photos, tmp_path):
    with open("/dev/full", "wb") as full, device(python, make_bundle(), photos, cwd=tmp_path, stdout=full) as running:
        assert running.wait(20) == 1
        assert running.stderr.read() == b"coinfer: standard output cannot be written (No space left on device); make room there or send it elsewhere.\n"
