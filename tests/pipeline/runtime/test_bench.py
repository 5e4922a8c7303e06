import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.errors import ProfileError
from pipeline.runtime.bench import CoderWork, ImageWork, LocalBench, ModelWork, Repeats
from pipeline.runtime.bundle import DEVICE, EDGE
from pipeline.runtime.images import FORMATS
from tests.pipeline.runtime.conftest import halves, model

TWICE = Repeats(threads=1, rounds=2, repeats=3, warmup=1, job_ms=1e3)


def test_a_model_is_timed_whole_and_kernel_by_kernel():
    (found,) = LocalBench().measure([ModelWork(halves(0)[DEVICE])], TWICE)
    assert len(found.ms) == 2 * 3
    assert min(found.ms) > 0
    optimised = onnx.load_from_string(found.optimised)
    assert sorted(event["args"]["op_name"] for event in found.events) == sorted(node.op_type for node in optimised.graph.node)
    assert all(event["dur"] > 0 for event in found.events)
    json.dumps(found.events)


def test_the_weights_do_not_come_back_with_an_optimised_model():
    wide = np.ones((64, 3, 7, 7), np.float32)
    nodes = [helper.make_node("Conv", ["image", "w"], ["code"])]
    data = model(nodes, ("image", TensorProto.FLOAT, ["batch", 3, 16, 16]), ("code", TensorProto.FLOAT, ["batch", 64, 10, 10]), w=wide)
    (found,) = LocalBench().measure([ModelWork(data)], TWICE)
    assert len(found.optimised) < wide.nbytes / 4
    assert [tuple(item.dims)[1:] for item in onnx.load_from_string(found.optimised).graph.initializer] == [(3, 7, 7)]


def test_everything_a_device_does_beside_its_network_can_be_timed():
    jobs = [ImageWork("preprocess", 12), CoderWork("encode", 60), CoderWork("decode", 60)]
    jobs += [ImageWork(work, 12, name, 60) for work in ("encode", "decode") for name in FORMATS]
    found = LocalBench().measure(jobs, TWICE, halves(0)[DEVICE])
    assert [len(samples.ms) for samples in found] == [6] * len(jobs)
    assert not any(samples.optimised or samples.events for samples in found)


def test_a_long_job_is_cut_short_and_a_short_one_is_repeated():
    jobs = [ImageWork("encode", 300, "webp", 100), ImageWork("preprocess", 2)]
    long, short = LocalBench().measure(jobs, Repeats(threads=1, rounds=1, repeats=50, warmup=0, job_ms=20))
    assert len(short.ms) > len(long.ms) >= 2


def test_a_model_of_integers_gets_integers():
    (found,) = LocalBench().measure([ModelWork(halves(0)[EDGE])], TWICE)
    assert len(found.ms) == 6


@pytest.mark.parametrize("data", [b"", b"no model", halves(0)[DEVICE][:-40]])
def test_what_is_no_model_is_refused_in_one_sentence(data):
    with pytest.raises(ProfileError, match=r"a job cannot be measured on this machine: .*; check") as caught:
        LocalBench().measure([ModelWork(data)], TWICE)
    assert "\n" not in str(caught.value)


def test_a_model_of_words_is_refused():
    data = model([helper.make_node("Identity", ["x"], ["y"])], ("x", TensorProto.STRING, [1]), ("y", TensorProto.STRING, [1]))
    with pytest.raises(ProfileError, match=r"input x of a model to measure is a tensor\(string\)"):
        LocalBench().measure([ModelWork(data)], TWICE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Repeats(0, 1, 1, 1, 1.0),
        lambda: Repeats(1, 1, 1, -1, 1.0),
        lambda: Repeats(1, 1000, 1000, 1, 1.0),
        lambda: Repeats(1, 1, 1, 1, float("inf")),
        lambda: Repeats(1, 1.5, 1, 1, 1.0),
        lambda: ImageWork("encode", 10**6),
        lambda: ImageWork("encode", 32, "gif"),
        lambda: ImageWork("draw", 32),
        lambda: CoderWork("encode", 0),
    ],
)
def test_jobs_beyond_reason_are_refused(make):
    with pytest.raises(ProfileError):
        make()


def test_a_machine_says_what_it_is():
    described = LocalBench().describe()
    assert {"cpu", "os", "arch"} <= described["machine"].keys()
    assert described["runtime"].startswith("onnxruntime ")
    assert described["coder"] in ("c", "python")


def test_boards_of_one_processor_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.bench.BOARD", tmp_path / "model")
    assert "board" not in LocalBench().describe()["machine"]
    (tmp_path / "model").write_bytes(b"Raspberry Pi 4 Model B Rev 1.4\0")
    assert LocalBench().describe()["machine"]["board"] == "Raspberry Pi 4 Model B Rev 1.4"
