from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from benchmarks import results_file
from pipeline.tracking import EXPERIMENT


def test_figures_and_pictures_of_a_result_are_a_run_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    figures = {"bits.first": results_file.figure(12.5, "bits", "counted"), "bits.last": results_file.figure(None, "bits", "not run yet")}
    (tmp_path / "sizes.json").write_text(json.dumps({"figures": figures}))
    (tmp_path / "sizes-fronts.png").write_bytes(b"picture")
    (tmp_path / "other.png").write_bytes(b"another's")
    results_file.track("sizes")
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert (run.info.run_name, run.info.status) == ("benchmark sizes", "FINISHED")
    assert run.data.metrics == {"bits.first": 12.5}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["sizes-fronts.png"]
