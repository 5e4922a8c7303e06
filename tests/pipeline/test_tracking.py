import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import numpy as np
import onnx
import pytest

from pipeline.cli import SECTIONS
from pipeline.errors import CoinferError, Interrupted
from pipeline.params import load_params
from pipeline.tracking import EXPERIMENT, little_patience, stage_run, tracking_uri

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def database(workdir, monkeypatch):
    uri = f"sqlite:///{workdir / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def runs(uri):
    client = mlflow.MlflowClient(uri)
    return client, client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])


def tiny_onnx(path):
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in ("image", "logits")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["image"], ["logits"])], "g", [value[0]], [value[1]])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)


def test_a_stage_is_one_run_with_tags_params_curves_pictures_and_signed_models(database, workdir):
    tiny_onnx(workdir / "device.onnx")
    with stage_run("search", "camera", workdir / "params.yaml") as tracker:
        tracker.log_params({"search": {"trials": 3}})
        for step in range(3):
            tracker.log_metrics({"loss": 1 / (1 + step)}, step=step)
        figure, _ = plt.subplots()
        tracker.log_figure(figure, "pareto")
        plt.close(figure)
        tracker.log_onnx(workdir / "device.onnx", "device-half", {"image": np.zeros((1, 2), np.float32)})
        with tracker.child("pareto 0") as child:
            child.log_metrics({"accuracy": 0.9})
    client, found = runs(database)
    parent = next(run for run in found if run.info.run_name == "search camera")
    nested = next(run for run in found if run.info.run_name == "pareto 0")
    assert parent.info.status == nested.info.status == "FINISHED"
    assert parent.data.params["search.trials"] == "3"
    assert [point.value for point in client.get_metric_history(parent.info.run_id, "loss")] == [1, 0.5, pytest.approx(1 / 3)]
    assert {"stage", "device", "git_commit", "params_hash", "pipeline_id"} <= set(parent.data.tags)
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert nested.data.tags["pipeline_id"] == parent.data.tags["pipeline_id"]
    assert "pareto.png" in [item.path for item in client.list_artifacts(parent.info.run_id)]
    (model,) = client.search_logged_models([parent.info.experiment_id])
    signature = mlflow.models.get_model_info(model.model_uri).signature
    assert signature.inputs.inputs[0].shape == (-1, 2)
    assert signature.outputs.inputs[0].name == "logits"
    loaded = mlflow.onnx.load_model(model.model_uri)
    assert loaded.graph.input[0].name == "image"


def test_a_failing_stage_leaves_a_failed_run(database, workdir):
    with pytest.raises(RuntimeError), stage_run("prepare", None, workdir / "params.yaml"):
        raise RuntimeError
    _, found = runs(database)
    assert [run.info.status for run in found] == ["FAILED"]


def test_patience_with_mlflow_is_little_unless_the_user_has_more(monkeypatch):
    retries, timeout = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
    monkeypatch.setenv(retries, "9")
    monkeypatch.delenv(timeout, raising=False)
    with little_patience():
        assert (os.environ[retries], os.environ[timeout]) == ("9", "10")
    assert (os.environ[retries], timeout in os.environ) == ("9", False)


def test_an_unusable_database_is_one_sentence(workdir, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workdir / 'params.yaml' / 'all.db'}")
    with pytest.raises(CoinferError, match="check MLFLOW_TRACKING_URI"), stage_run("prepare", None, workdir / "params.yaml"):
        pass


def test_the_default_database_is_looked_up_under_dvc_root(workdir, monkeypatch, tmp_path_factory):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert tracking_uri() == f"sqlite:///{workdir / 'mlflow.db'}"
    elsewhere = tmp_path_factory.mktemp("root")
    monkeypatch.setenv("DVC_ROOT", str(elsewhere))
    assert tracking_uri() == f"sqlite:///{elsewhere / 'mlflow.db'}"


@pytest.mark.parametrize("way", [["--temp"], ["--queue"]])
def test_experiments_in_copies_log_to_the_database_of_the_repository(tmp_path, way, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    bin_dir = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(bin_dir), prepend=os.pathsep)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.tracking import tracking_uri; open('uri.txt', 'w').write(tracking_uri())"
    (tmp_path / "stage.py").write_text(code)
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  s:\n    cmd: {sys.executable} stage.py\n    params: [a]\n    deps: [stage.py]\n    outs: [uri.txt]\n")

    def call(*command):
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=100)

    call("git", "init", "-q")
    call("git", "config", "user.email", "a@b.c")
    call("git", "config", "user.name", "n")
    dvc = str(bin_dir / "dvc")
    call(dvc, "init", "-q")
    call("git", "add", "-A")
    call("git", "commit", "-qm", "start")
    call(dvc, "exp", "run", "-q", *way, "-S", "a=2", "-n", "other")
    if way == ["--queue"]:
        call(dvc, "exp", "run", "-q", "--run-all")
    call(dvc, "exp", "apply", "-q", "other")
    assert (tmp_path / "uri.txt").read_text() == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_relative_database_lies_at_the_dvc_root_too(workdir, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    monkeypatch.setenv("DVC_ROOT", str(elsewhere := tmp_path_factory.mktemp("root")))
    assert tracking_uri() == f"sqlite:///{elsewhere / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert tracking_uri() == "http://localhost:5000"


def test_an_interrupted_stage_is_told_from_a_failed_one(database, workdir):
    with pytest.raises(Interrupted), stage_run("prepare", None, workdir / "params.yaml"):
        raise Interrupted("stopped")
    _, found = runs(database)
    assert [run.info.status for run in found] == ["KILLED"]


def test_names_of_files_do_not_become_keys(database, workdir):
    with stage_run("pretrain", None, workdir / "params.yaml") as tracker:
        tracker.log_params({"pretrain": {"teachers": {"weights/a+b.safetensors": "resnet20"}, "epochs": 1}})
    _, (run,) = runs(database)
    assert run.data.params == {"pretrain.teachers": '{"weights/a+b.safetensors": "resnet20"}', "pretrain.epochs": "1"}


def test_a_store_that_cannot_be_written_is_one_sentence(database, workdir):
    def stage():
        with stage_run("prepare", None, workdir / "params.yaml") as tracker:
            (workdir / "mlartifacts").write_text("a file where the folder should be")
            tracker.log_file(workdir / "params.yaml")

    with pytest.raises(CoinferError, match="check MLFLOW_TRACKING_URI, the permissions of its files and the space"):
        stage()


def test_what_mlflow_refuses_in_a_stage_is_one_sentence(database, workdir):
    def stage():
        with stage_run("prepare", None, workdir / "params.yaml") as tracker:
            tracker.log_params({"epochs": 1})
            tracker.log_params({"epochs": 2})  # MLflow keeps one value a key

    with pytest.raises(CoinferError, match="check MLFLOW_TRACKING_URI"):
        stage()


def test_every_stage_shows_its_parameters(database, workdir):
    params = load_params()
    for stage, sections in SECTIONS.items():
        with stage_run(stage, None, workdir / "params.yaml") as tracker:
            tracker.log_params(params.model_dump(include=set(sections)) | {"device": params.device("camera").model_dump()})
    _, found = runs(database)
    assert {run.data.tags["stage"] for run in found} == set(SECTIONS)
    for run in found:
        assert run.data.params["device.link.rate_mbps"] == "10.0"
        assert {key.split(".")[0] for key in run.data.params} == {*SECTIONS[run.data.tags["stage"]], "device"}
