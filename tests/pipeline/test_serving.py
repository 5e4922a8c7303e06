"""A run of the edge server as MLflow shows it."""

import json
from pathlib import Path

import mlflow
import pytest

from pipeline.errors import CoinferError
from pipeline.plots import histograms
from pipeline.runtime.hello import Hello
from pipeline.runtime.tally import MS, Histogram, Refusal, Tally
from pipeline.serving import log_or_keep, log_serving
from pipeline.tracking import EXPERIMENT, new_run

OURS, NEXT = b"ours", b"next"


@pytest.fixture
def tally():
    tally = Tally()
    tally.batch(OURS, [0.0, 3.0, 30.0], [0.3, 0.3, 0.3], 4.0, [0.5, 0.95, 1.0])
    tally.batch(OURS, [9_999.0], [0.3], 1.0, [0.2])
    tally.batch(NEXT, [0.0], [0.3], 1.0, [0.7])
    tally.refused(Refusal.BUSY)
    tally.carried("in", 1_000)
    tally.hello(Hello("ant", "1.0", alone=1))
    tally.answered("ant", alone=1)
    tally.answered("ant", frames=2)
    return tally


def test_totals_and_each_bundle_are_runs_with_pictures(tally, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    with new_run("serve", {"stage": "serve"}) as tracker:
        log_serving(tally, tracker)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs.db'}")
    found = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])}
    assert set(found) == {"serve", "serve 6f757273", "serve 6e657874"}
    totals, ours = found["serve"], found["serve 6f757273"]
    assert {name: totals.data.metrics[name] for name in ("answered", "refused.busy", "refused.keys", "bytes_in", "devices", "fallback_share")} == {
        "answered": 5,
        "refused.busy": 1,
        "refused.keys": 0,
        "bytes_in": 1_000,
        "devices": 1,
        "fallback_share": 0.25,
    }
    assert (ours.data.tags["bundle_id"], ours.data.tags["stage"], ours.data.tags["mlflow.parentRunId"]) == ("6f757273", "serve", totals.info.run_id)
    assert (ours.data.metrics["answered"], ours.data.metrics["batch_frames.mean"], ours.data.metrics["decode_ms.mean"]) == (4, 2, pytest.approx(0.3))
    assert {item.path for item in client.list_artifacts(ours.info.run_id)} == {"ms_by_part.png", "confidence.png"}
    summary = json.loads(Path(client.download_artifacts(totals.info.run_id, "summary.json")).read_text())
    assert summary["bundles"]["6f757273"]["confidence"]["counts"] == [0, 1, 0, 0, 1, 0, 0, 0, 0, 2, 0]
    assert summary["devices"]["ant"] | {"seen_s": 0} == {"version": "1.0", "seen_s": 0, "answered": 3, "alone": 1}


def test_where_nothing_can_be_logged_or_written_the_summary_is_printed(tally, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http:/nowhere")
    monkeypatch.chdir("/proc")
    with pytest.raises(CoinferError, match=r"could not be logged and is on standard output.*MLflow at http:/nowhere cannot be used"):
        log_or_keep(tally)
    assert json.loads(capsys.readouterr().out)["bundles"]["6f757273"]["answered"] == 4


def test_a_server_that_nobody_asked_has_no_share_to_tell(tracker):
    log_serving(Tally(), tracker)
    ((metrics, _),) = tracker.metrics
    assert metrics["answered"] == 0
    assert "fallback_share" not in metrics


def test_a_quantile_lies_between_the_bounds_that_hold_it():
    histogram = Histogram(MS)
    histogram.add([0.05] * 50 + [3.0] * 49 + [9_999.0])
    assert 0 < histogram.quantile(0.25) <= 0.1
    assert histogram.quantile(0.5) == pytest.approx(0.1)
    assert 2 < histogram.quantile(0.9) <= 5
    assert histogram.quantile(1.0) == 5_000
    assert Histogram(MS).quantile(0.5) == 5_000


def test_bars_show_shares_and_what_is_above_the_last_bound_only_if_there_is_any():
    figure = histograms({"a": ((1, 2), (3, 1, 0)), "b": ((1, 2), (0, 0, 2))}, "up to", "title")
    a, b = figure.axes
    assert [bar.get_height() for bar in a.patches] == [0.75, 0.25]
    assert [bar.get_height() for bar in b.patches] == [0, 0, 1]
    assert [label.get_text() for label in b.get_xticklabels()] == ["1", "2", "> 2"]
