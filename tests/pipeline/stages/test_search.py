import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from models.cutting import cut_points
from pipeline.errors import CoinferError, Interrupted
from pipeline.params import load_params, parse_params
from pipeline.paths import BACKBONE_WEIGHTS, DATA_CARD, STUDIES, DevicePaths, split_file
from pipeline.search.evaluator import Evaluator
from pipeline.stages.search import run
from tests import tiny
from tests.conftest import ROOT
from tests.pipeline.costs.profiles import toy_profile
from tests.pipeline.search.fake_measures import measurement
from tests.pipeline.search.fakes import METHODS
from tests.pipeline.search.toy import DEVICE_MS_PER_MMAC, EDGE_MS_PER_MMAC, pictures

PATHS = DevicePaths("camera")


@pytest.fixture
def prepared(workdir, tiny_backbone):
    """What the stages before would have left."""
    for path in (DATA_CARD, BACKBONE_WEIGHTS, PATHS.cuts):
        path.parent.mkdir(parents=True)
    PATHS.supernet.mkdir()
    DATA_CARD.write_text(json.dumps({"classes": list("0123456789"), "image_size": 16, "sha256": {"all": "0"}}))
    for name, count in (("train", 80), ("validation", 30)):
        images, labels = pictures(count, seed=count)
        save_file({"images": images, "labels": labels}, split_file(name))
    save_file(tiny_backbone.state_dict(), BACKBONE_WEIGHTS)
    cuts = cut_points(tiny_backbone, torch.zeros(1, 3, 16, 16))
    PATHS.cuts.write_text(json.dumps([{**cut.to_dict(), "elements": cut.elements, "feature_bytes": 4 * cut.elements} for cut in cuts]))
    toy_profile(DEVICE_MS_PER_MMAC).save(PATHS.device_profile)
    toy_profile(EDGE_MS_PER_MMAC).save(PATHS.edge_profile)
    return workdir


def outs():
    return [path.read_bytes() for path in (PATHS.trials, PATHS.pareto, PATHS.chosen)]


def with_(fields, **sections):
    return parse_params({name: fields[name] | sections.get(name, {}) for name in fields})


def test_a_search_leaves_trials_pareto_set_and_choice(prepared, digits_params, tracker):
    found = run(digits_params, "camera", tracker)
    chosen = json.loads(PATHS.chosen.read_text())
    assert chosen == found
    assert chosen["floor"] == pytest.approx(chosen["reference_accuracy"] - 0.9)
    assert chosen["device_only"]["candidate"]["cut"] == "output"
    assert chosen["edge_only"]["candidate"]["quality"] in (100, 30)
    pareto = json.loads(PATHS.pareto.read_text())
    assert chosen["chosen"]["number"] == pareto["chosen"] == min(pareto["points"], key=lambda p: p["measurement"]["total_ms"])["number"]
    rows = list(csv.DictReader(io.StringIO(PATHS.trials.read_text())))
    assert len([row for row in rows if row["state"] != "reused"]) == 3 + digits_params.search.trials
    assert [int(row["number"]) for row in rows if row["pareto"] == "1"] == [p["number"] for p in pareto["points"]]
    assert str(prepared) not in "".join(text.decode() for text in outs())

    progress = list(csv.DictReader(io.StringIO(PATHS.progress.read_text())))
    assert [int(row["evaluations"]) for row in progress] == list(range(digits_params.search.trials + 1))
    assert float(progress[-1]["best"]) == pytest.approx(chosen["chosen"]["measurement"]["total_ms"], rel=1e-5)
    assert tracker.figures == ["pareto.png", "hypervolume.png"], "three trials say nothing of importances"
    assert PATHS.importances.read_text() == "parameter,explains,importance\n"
    assert tracker.files == [PATHS.trials, PATHS.pareto, PATHS.chosen, PATHS.progress, PATHS.importances, PATHS.learning]
    assert PATHS.learning.read_text() == "number,cut,weight,reward,sigma\n", "nothing learns here"
    assert len(tracker.children) == len(pareto["points"])
    assert any("chosen_total_ms" in metrics for metrics, _ in tracker.metrics)


def test_a_killed_search_gives_the_same_outs(prepared, digits_params, tracker):
    with subprocess.Popen([sys.executable, "-c", RUN], env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None and not any(path.read_bytes().count(b"\n") >= 3 for path in STUDIES.glob("*/journal.log")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not PATHS.chosen.exists()
    run(digits_params, "camera", tracker)
    resumed = outs()
    assert len(list(STUDIES.iterdir())) == 1, "the killed search was not found again"
    for journal in STUDIES.glob("*/journal.log"):
        journal.unlink()
    run(digits_params, "camera", tracker)
    assert outs() == resumed


RUN = """
import torch
from pipeline.params import load_params
from pipeline.stages.search import run
from tests.conftest import RecordingTracker
run(load_params(), "camera", RecordingTracker())
"""


@pytest.fixture
def quick(monkeypatch):
    """Candidates measured by a formula; gives the list of those asked for."""
    asked = []

    def measure(self, candidate, trial_seed, *, rescores):
        asked.append(candidate)
        return measurement(1.0, 5.0 + (candidate.quality or 40), float(candidate.quality or 0))

    monkeypatch.setattr(Evaluator, "measure", measure)
    return asked


def test_ctrl_c_says_what_is_kept(prepared, digits_params, tracker, quick, monkeypatch):
    with monkeypatch.context() as patch:
        measure = Evaluator.measure

        def interrupted(self, candidate, trial_seed, *, rescores):
            if len(quick) == 4:
                raise KeyboardInterrupt
            return measure(self, candidate, trial_seed, rescores=rescores)

        patch.setattr(Evaluator, "measure", interrupted)
        with pytest.raises(Interrupted, match=r"search camera was interrupted: \d+ trials are kept in .*journal.log; `dvc repro` goes on"):
            run(digits_params, "camera", tracker)
    assert not PATHS.chosen.exists()
    before = list(quick)
    run(digits_params, "camera", tracker)
    assert not set(before) & set(quick[len(before) :])


def test_another_choice_from_the_same_study_measures_nothing(prepared, digits_fields, tracker, quick):
    run(with_(digits_fields), "camera", tracker)
    trials, measured = PATHS.trials.read_text(), len(quick)
    run(with_(digits_fields, objective={"minimize": "wire_bytes"}), "camera", tracker)
    assert json.loads(PATHS.chosen.read_text())["chosen"]["measurement"]["wire_bytes"] == 0
    assert PATHS.trials.read_text() == trials
    assert len(quick) == measured


def test_importances_are_drawn_where_there_is_enough_to_say(prepared, digits_fields, tracker, monkeypatch):
    monkeypatch.setattr(
        Evaluator, "measure", lambda self, candidate, seed, *, rescores: measurement(1.0 - 1 / (1 + (candidate.bits or 9)), 5.0 + (candidate.stride or 40), 9.0)
    )
    run(with_(digits_fields, search={"trials": 25, "method": "random"}), "camera", tracker)
    assert tracker.figures == ["pareto.png", "hypervolume.png", "importances.png"]
    rows = list(csv.DictReader(io.StringIO(PATHS.importances.read_text())))
    assert [next(row["parameter"] for row in rows if row["explains"] == target) for target in ("accuracy", "total_ms")] == ["bits", "stride"]


@pytest.mark.parametrize("method", METHODS)
def test_the_kind_of_codec_is_searched(prepared, digits_fields, tracker, method):
    kinds = ["rate", "codebook", "multi-rate"]
    run(with_(digits_fields, search={"codecs": kinds, "trials": 12, "method": method, "codec_steps": 1}), "camera", tracker)
    rows = list(csv.DictReader(io.StringIO(PATHS.trials.read_text())))
    splits = [row for row in rows if row["codec"]]
    assert {row["codec"] for row in splits} == set(kinds)
    assert {row["state"] for row in splits} <= {"measured", "reused"}, [row["failure"] for row in splits]
    for row in splits:
        assert bool(row["rate_weight"]) == (row["codec"] == "rate")
        assert (row["points"] == "[]") == (row["codec"] != "multi-rate")
        assert row["codec"] in row["label"]


def test_which_kind_of_codec_it_is_may_matter_most(prepared, digits_fields, tracker, monkeypatch):
    worth = {"rate": 0.9, "codebook": 0.5}

    def measure(self, candidate, trial_seed, *, rescores=False):
        return measurement(worth.get(candidate.codec, 1.0), 5.0 + (candidate.stride or 40), 9.0)

    monkeypatch.setattr(Evaluator, "measure", measure)
    run(with_(digits_fields, search={"codecs": list(worth), "trials": 25, "method": "random"}), "camera", tracker)
    rows = list(csv.DictReader(io.StringIO(PATHS.importances.read_text())))
    assert [next(row["parameter"] for row in rows if row["explains"] == target) for target in ("accuracy", "total_ms")] == ["codec", "stride"]


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_several_workers_give_the_outs_of_one(prepared, digits_fields, tracker, method):
    """They build their evaluators from params and artefacts; on one thread each the arithmetic is the same too."""
    run(with_(digits_fields, search={"method": method, "trials": 4}), "camera", tracker)
    alone = outs()
    for journal in STUDIES.glob("*/journal.log"):
        journal.unlink()
    run(with_(digits_fields, search={"method": method, "trials": 4, "workers": 2}), "camera", tracker)
    assert len(list(STUDIES.iterdir())) == 1, "as many threads each, so the same study"
    assert outs() == alone


def test_a_ray_address_that_nobody_answers_at_is_one_sentence(prepared, digits_fields, tracker):
    pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
    with pytest.raises(CoinferError, match=r"nobody answers at search\.ray_address 127\.0\.0\.1:1 "):
        run(with_(digits_fields, search={"executor": "ray", "ray_address": "127.0.0.1:1"}), "camera", tracker)


def test_an_image_format_without_measured_times_is_one_sentence(prepared, digits_fields, tracker):
    with pytest.raises(CoinferError, match=r"the profile has no times of jpeg-bare images, only jpeg, png, webp; measure it again, or send another format"):
        run(with_(digits_fields, search={"images": {"webp": [100], "jpeg-bare": [60]}}), "camera", tracker)


def test_other_inputs_are_another_study(prepared, digits_fields, digits_params, tracker, quick):
    run(digits_params, "camera", tracker)
    run(with_(digits_fields, search={"learning_rate": 0.03}), "camera", tracker)
    torch.manual_seed(1)
    save_file(tiny.tiny_backbone(10, 16).state_dict(), BACKBONE_WEIGHTS)
    run(digits_params, "camera", tracker)
    assert len(list(STUDIES.iterdir())) == 3


@pytest.mark.parametrize(("method", "studies"), [("random", 1), ("uniform", 1), ("tpe", 3), ("ddpg", 3)])
def test_limits_and_the_agents_settings_are_another_study_only_for_methods_that_read_them(prepared, digits_fields, tracker, quick, method, studies):
    fields, changes = digits_fields | {"search": digits_fields["search"] | {"method": method}}, ({}, {"max_latency_ms": 900}, {"max_energy_mj": 900})
    for change in changes:
        run(with_(fields, objective=change), "camera", tracker)
    assert len(list(STUDIES.iterdir())) == studies
    run(with_(fields, search={"ddpg": {"reward_weights": [0.2]}}), "camera", tracker)
    assert len(list(STUDIES.iterdir())) == studies + (method == "ddpg")


def test_other_objectives_are_another_study_where_they_are_searched_for(prepared, digits_fields, tracker, quick):
    for minimize, studies in (("latency_ms", 1), ("wire_bytes", 1), ("energy_mj", 2)):
        run(with_(digits_fields, objective={"minimize": minimize}), "camera", tracker)
        assert len(list(STUDIES.iterdir())) == studies


def test_what_nothing_can_keep_is_refused_before_the_first_trial(prepared, digits_fields, tracker, quick):
    with pytest.raises(CoinferError, match=r"even with the least that is foreseen of each: none keeps the limit on latency; nearest are .* ms of 0\.02 ms"):
        run(with_(digits_fields, objective={"max_latency_ms": 0.02}), "camera", tracker)
    assert not quick
    assert not STUDIES.exists()


def test_a_device_too_small_for_everything_names_memory(prepared, digits_fields, tracker, quick):
    digits_fields["devices"]["camera"]["memory_mb"] = 1e-6
    with pytest.raises(CoinferError, match=r"none keeps the limit on memory; nearest are .* MB of the device's 1e-06 MB \(memory_mb\)"):
        run(parse_params(digits_fields), "camera", tracker)
    assert not PATHS.chosen.exists()


def test_missing_inputs_are_one_sentence(prepared, tracker):
    PATHS.cuts.unlink()
    with pytest.raises(CoinferError, match=r"cuts\.json is missing; run `dvc repro`"):
        run(load_params(), "camera", tracker)


def test_an_agent_leaves_its_learning_curve(prepared, digits_fields, tracker, quick):
    run(with_(digits_fields, search={"method": "ddpg", "trials": 12}), "camera", tracker)
    rows = list(csv.DictReader(io.StringIO(PATHS.learning.read_text())))
    assert len(rows) >= 12
    assert {row["weight"] for row in rows} == {"0.03", "0.1", "0.3"}
    assert all(row["reward"] for row in rows)
    assert "learning.png" in tracker.figures


def test_without_the_folder_of_the_supernet_nothing_is_searched(prepared, digits_params, tracker):
    PATHS.supernet.rmdir()
    with pytest.raises(CoinferError, match=r"artifacts/camera/supernet is missing; run `dvc repro` to make it"):
        run(digits_params, "camera", tracker)
