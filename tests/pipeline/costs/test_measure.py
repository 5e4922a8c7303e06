"""Measuring a real machine, here and through a profile agent, for seconds instead of minutes."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
import yaml

from models.cutting import cut_points
from pipeline.cli import app
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.measure import forget_kept, measure_into
from pipeline.costs.random_halves import random_halves
from pipeline.costs.remote_bench import RemoteBench
from pipeline.errors import CoinferError, Interrupted, ParamsError, ProfileError
from pipeline.params import Params
from pipeline.paths import STATE
from pipeline.runtime.bench import LocalBench, Repeats, Samples, Work
from pipeline.runtime.bench_server import serve_bench
from tests.conftest import QUICK_PLAN, ROOT
from tests.pipeline.costs.profiles import toy_profile, whole
from tests.tiny import tiny_backbone

KEY = "tests.tiny:tiny_backbone@3x16x16"
BENCH = Path("profiles/bench.json")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile that the command measures of this machine, quickly."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "profiles").mkdir()
    (folder / "profiles/measure.json").write_text(json.dumps(QUICK_PLAN))
    fields = yaml.safe_load((ROOT / "params.yaml").read_text())
    fields["backbone"]["name"] = "tests.tiny:tiny_backbone"
    (folder / "params.yaml").write_text(yaml.safe_dump(fields))
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "profile", "--into", str(BENCH)]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / STATE / "profiling").exists()
    return folder / BENCH


def test_a_machine_is_measured_kernel_by_kernel_and_run_by_run(measured: Path) -> None:
    profile = DeviceProfile.load(measured)
    assert profile.name == "bench"
    assert profile.runtime == f"onnxruntime {ort.__version__}"
    assert set(profile.networks) == {KEY}
    assert set(profile.networks[KEY].ms) == {"fp32", "int8"}
    assert set(profile.images) == {16}
    assert set(profile.images[16].encode) == {"webp", "jpeg"}
    assert {call for run in profile.runs for call in run.calls} == set(profile.kernels), "each run is known kernel by kernel"
    assert {call.dtype for call in profile.kernels} > {"float"}
    assert profile.nchwc_block in (0, 8, 16)
    assert profile.channel_block == (profile.nchwc_block or 4)
    assert profile.half_ms(whole()) > 0


def test_an_agent_gives_the_same_kind_of_profile_and_both_can_be_merged(measured: Path, workdir: Path, digits_params: Params) -> None:
    ports: list[int] = []
    ready = threading.Event()
    threading.Thread(target=serve_bench, kwargs={"announce": lambda port: (ports.append(port), ready.set())}, daemon=True).start()
    assert ready.wait(10)
    with RemoteBench(f"127.0.0.1:{ports[0]}") as bench:
        there = measure_into(digits_params, BENCH, bench)
    here = DeviceProfile.load(measured)
    assert there.kernels.keys() == here.kernels.keys()
    assert [run.calls for run in there.runs] == [run.calls for run in here.runs]
    assert (there.machine, there.runtime, there.threads) == (here.machine, here.runtime, here.threads)
    assert there.merged(here).kernels == here.kernels
    assert DeviceProfile.load(BENCH).to_dict() == there.to_dict()


class Idle(LocalBench):
    def measure(self, jobs: Sequence[Work], repeats: Repeats, beside: bytes | None = None) -> list[Samples]:
        pytest.fail("measured before it was refused")


def test_a_profile_of_another_machine_is_not_extended_nor_measured_for(workdir: Path, digits_params: Params) -> None:
    toy_profile().save(BENCH)
    before = BENCH.read_bytes()
    with pytest.raises(ProfileError, match=r"profile toy has machine .* but this measurement .*; measure into another file"):
        measure_into(digits_params, BENCH, Idle())
    assert BENCH.read_bytes() == before


def test_a_slowed_profile_and_one_with_another_coder_are_not_measured_for(workdir: Path, digits_params: Params) -> None:
    here = LocalBench().describe()
    mine = replace(toy_profile(), machine=here["machine"], runtime=here["runtime"], threads=QUICK_PLAN["threads"])
    mine.slowed(5).save(BENCH)
    with pytest.raises(ProfileError, match=r"profile toy has slowdown 5\.0 but this measurement 1\.0"):
        measure_into(digits_params, BENCH, Idle())
    replace(mine, coder=replace(mine.coder, implementation="rust")).save(BENCH)
    with pytest.raises(ProfileError, match=r"profile toy has coder rust but this measurement"):
        measure_into(digits_params, BENCH, Idle())


@pytest.mark.parametrize("said", [{"optimised": b"no model"}, {"events": ({"cat": "Node"},)}])
def test_a_bench_that_says_what_nobody_understands_is_one_sentence(workdir: Path, digits_params: Params, said: dict[str, Any]) -> None:
    class Odd(LocalBench):
        def measure(self, jobs: Sequence[Work], repeats: Repeats, beside: bytes | None = None) -> list[Samples]:
            return [replace(samples, **said) for samples in super().measure(jobs, repeats, beside)]

    with pytest.raises(ProfileError, match=r"what ONNX Runtime says of its run is not understood \(.*\); delete \.coinfer/profiling/\w+ and measure") as caught:
        measure_into(digits_params, BENCH, Odd())
    assert "\n" not in str(caught.value)


class Remembering(LocalBench):
    """Measures, but for the request number `interrupted_at`."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        self.interrupted_at, self.done = interrupted_at, list[Sequence[Work]]()

    def measure(self, jobs: Sequence[Work], repeats: Repeats, beside: bytes | None = None) -> list[Samples]:
        if len(self.done) == self.interrupted_at:
            raise KeyboardInterrupt
        self.done.append(jobs)
        return super().measure(jobs, repeats, beside)


def test_an_interrupted_measurement_goes_on_where_it_was(workdir: Path, digits_params: Params) -> None:
    first, second, third = Remembering(interrupted_at=2), Remembering(), Remembering()
    with pytest.raises(Interrupted, match=r"measuring was interrupted; what is measured is kept in \.coinfer/profiling/\w+, run it again to go on from there"):
        measure_into(digits_params, BENCH, first)
    assert not BENCH.exists()
    forget_kept("other")
    forget_kept("bench", RemoteBench("192.168.1.20:7071"))
    kept = sorted((STATE / "profiling").glob("*/*"))
    assert len(kept) == len(first.done) == 2
    kept[0].write_bytes(b"damaged")
    with pytest.raises(CoinferError, match=r"cannot write"):
        measure_into(digits_params, Path("params.yaml/bench.json"), second)
    assert sum(jobs in first.done for jobs in second.done) == 1, "only what was damaged is measured again"
    assert len(second.done) > 1
    measure_into(digits_params, BENCH, third)
    assert not third.done, "what could not be written is not measured again"
    assert set(DeviceProfile.load(BENCH).networks) == {KEY}
    assert not (STATE / "profiling").exists()
    assert {file.suffix for file in Path("profiles").iterdir()} == {".json"}


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 0},
        {"passes": 0},
        {"chains": 0, "halves": 0, "edge_halves": 0, "int8_halves": 0},
        {"edge_halves": 99},
        {"coder_symbols": [64]},
        {"coder_symbols": [64, 64]},
        {"qualities": {}},
        {"qualities": {"webp": []}},
        {"qualities": {"gif": [1]}},
        {"qualities": [1]},
        {"image_sizes": [10**6]},
        {"speed": 1},
        {"warmup": "no"},
        {"job_ms": -1},
    ],
)
def test_a_measuring_plan_that_cannot_be_followed_is_refused(workdir: Path, digits_params: Params, change: dict[str, Any]) -> None:
    Path("profiles/measure.json").write_text(json.dumps({**QUICK_PLAN, **change}))
    with pytest.raises(ProfileError, match=r"the measuring plan profiles/measure.json is wrong") as caught:
        measure_into(digits_params, BENCH)
    assert "\n" not in str(caught.value)
    assert not BENCH.exists()


def test_random_halves_are_the_same_every_time_and_take_and_give_what_halves_do() -> None:
    model, example = tiny_backbone(10, 16).eval(), torch.zeros(1, 3, 16, 16)
    state = torch.get_rng_state()
    on_device, on_edge = random_halves(model, example, cut_points(model, example), (6, 2), 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(on_device), len(on_edge)) == (6, 2)
    kinds = [onnx.load_from_string(half).graph.output[0].type.tensor_type.elem_type for half in on_device]
    assert set(kinds) == {onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT}, "symbols, and logits at the last cut"
    assert {onnx.load_from_string(half).graph.input[0].type.tensor_type.elem_type for half in on_edge} == {onnx.TensorProto.UINT8}
    assert len(set(on_device)) == 6
    assert random_halves(model, example, cut_points(model, example), (2, 1), 8)[0] == on_device[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "127.0.0.1:7071"], "--on names a machine to measure; say with --into which profile to write"),
        (["--into", "a.json", "--device", "camera"], "give one of them"),
        (["--into", "a.json", "--on", "nowhere"], "address 'nowhere' is not HOST:PORT"),
    ],
)
def test_options_that_do_not_go_together_are_refused(workdir: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        app(["profile", *arguments], standalone_mode=False)


def test_the_committed_profiles_are_of_one_machine_and_know_the_backbones_of_the_examples() -> None:
    root, example = (DeviceProfile.load(ROOT / folder / "profiles/epyc.json") for folder in (".", "examples/cifar10"))
    assert root == example
    assert set(root.networks) == {"resnet8@3x16x16", "resnet20@3x32x32"}
    assert (ROOT / "profiles/epyc.json").stat().st_size < 1_500_000
    assert (ROOT / "profiles/measure.json").read_bytes() == (ROOT / "examples/cifar10/profiles/measure.json").read_bytes()
