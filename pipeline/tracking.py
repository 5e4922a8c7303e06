"""What a stage tells the outside: the `Tracker` seam and its MLflow implementation, the only importer of mlflow."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from pipeline.errors import CoinferError, Interrupted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "coinfer"
SCHEMES = re.compile(r"|file|https?|databricks|databricks-uc|uc|(sqlite|postgresql|mysql|mssql)(\+\w+)?")  # beside those of MLflow's plugins
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # s; by default MLflow tries for minutes, without a word
SQLITE = "sqlite:///"
_PLAIN = re.compile(r"[\w-]+")


class Tracker(Protocol):
    """Where a stage reports parameters, metrics, pictures, files and models."""

    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...
    def log_figure(self, figure: Figure, name: str) -> None: ...
    def log_file(self, path: Path) -> None: ...
    def log_onnx(self, path: Path, name: str, input_example: dict[str, np.ndarray]) -> None: ...
    def child(self, name: str, **tags: str) -> AbstractContextManager[Tracker]: ...


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else mlflow.db at the DVC root; a relative sqlite path is taken from that root too.

    DVC sets `DVC_ROOT` to the repository an experiment was started in, also for the copies that `--temp` and `--queue` make,
    so every run lands in one database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return f"{SQLITE}{Path(os.environ.get('DVC_ROOT', '.')).resolve() / uri.removeprefix(SQLITE)}" if uri.startswith(SQLITE) else uri


def check_tracking() -> None:
    """Find out what can be found out without asking anybody, and without the seconds that importing MLflow takes.

    Raises:
        CoinferError: no MLflow can be at such an address.
        ModuleNotFoundError: MLflow is not installed.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ModuleNotFoundError("MLflow is not installed", name="mlflow")
    parts = urlsplit(uri := tracking_uri())
    known = SCHEMES.fullmatch(parts.scheme) or parts.scheme in {point.name for point in entry_points(group="mlflow.tracking_store")}
    if not known or (parts.scheme in ("http", "https") and not parts.hostname):
        raise CoinferError(f"MLFLOW_TRACKING_URI is {uri!r}, where no MLflow can be; give for instance http://HOST:5000 or sqlite:///mlflow.db.")


@contextmanager
def little_patience() -> Iterator[None]:
    """MLflow gives a server that does not answer up within half a minute, unless the environment says how long it should try."""
    ours = PATIENCE.keys() - os.environ.keys()
    os.environ.update({name: PATIENCE[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def provenance(stage: str, device: str | None, params_file: Path) -> dict[str, str]:
    """The tags of a run; `pipeline_id` is shared by the stages of one `dvc repro`, `project` is the folder in the repository."""
    params_hash = hashlib.sha256(params_file.read_bytes()).hexdigest()[:12]
    git = subprocess.run(["git", "rev-parse", "HEAD", "--show-prefix"], capture_output=True, text=True, check=False)
    commit, project = (*git.stdout.splitlines(), "", "")[:2] if git.returncode == 0 else ("none", "")
    tags = {"stage": stage, "project": project.rstrip("/") or ".", "git_commit": commit, "params_hash": params_hash}
    tags["pipeline_id"] = hashlib.sha256(f"{project} {commit} {params_hash}".encode()).hexdigest()[:12]
    if device:
        tags["device"] = device
    return tags


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; a mapping from files, whose names MLflow may refuse as keys, stays one value in JSON."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping) and not all(map(_PLAIN.fullmatch, value)):
            flat[f"{prefix}{key}"] = json.dumps(value)
        elif isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def _reaching_mlflow() -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CoinferError(
            f"MLflow at {tracking_uri()} cannot be used ({reason}); check MLFLOW_TRACKING_URI, the permissions of its files and the space on its disk."
        ) from error


class MlflowTracker:
    """One MLflow run."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client = client
        self._run = run

    @_reaching_mlflow()
    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(self._run.info.run_id, params=[Param(key, str(value)) for key, value in flatten(params).items()])

    @_reaching_mlflow()
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._run.info.run_id, metrics=[Metric(key, float(value), now, step or 0) for key, value in metrics.items()])

    @_reaching_mlflow()
    def log_figure(self, figure: Figure, name: str) -> None:
        self._client.log_figure(self._run.info.run_id, figure, name if name.endswith(".png") else f"{name}.png")

    @_reaching_mlflow()
    def log_file(self, path: Path) -> None:
        self._client.log_artifact(self._run.info.run_id, str(path))

    @_reaching_mlflow()
    def log_onnx(self, path: Path, name: str, input_example: dict[str, np.ndarray]) -> None:
        """Log `path` as an MLflow ONNX model whose signature leaves the batch axis open."""
        import mlflow
        import onnx
        import onnxruntime
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, input_example), strict=True))

        def schema(arrays: Mapping[str, np.ndarray]) -> Schema:
            return Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]), key) for key, array in arrays.items()])

        with mlflow.start_run(run_id=self._run.info.run_id):
            mlflow.onnx.log_model(
                onnx.load(path),
                name=name,
                signature=ModelSignature(schema(input_example), schema(outputs)),
                pip_requirements=[f"onnxruntime=={onnxruntime.__version__}"],
                save_as_external_data=False,
            )
            mlflow.end_run("RUNNING")

    @contextmanager
    def child(self, name: str, **tags: str) -> Iterator[Tracker]:
        """A run within this one, with its tags and some more."""
        inherited = {key: value for key, value in self._run.data.tags.items() if not key.startswith("mlflow.")}
        tags = {"mlflow.parentRunId": self._run.info.run_id, **inherited, **tags}
        with _reaching_mlflow():
            run = self._client.create_run(self._run.info.experiment_id, run_name=name, tags=tags)
        with _closing(self._client, run):
            yield MlflowTracker(self._client, run)


@contextmanager
def _closing(client: MlflowClient, run: Run) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with _reaching_mlflow():
            client.set_terminated(run.info.run_id, "KILLED" if isinstance(error, (KeyboardInterrupt, Interrupted)) else "FAILED")
        raise
    with _reaching_mlflow():
        client.set_terminated(run.info.run_id, "FINISHED")


@contextmanager
def stage_run(stage: str, device: str | None, params_file: Path) -> Iterator[MlflowTracker]:
    """One MLflow run for one executed stage, marked failed when the block raises.

    Raises:
        CoinferError: the tracking database or server cannot be used.
    """
    with new_run(f"{stage} {device}" if device else stage, provenance(stage, device, params_file)) as tracker:
        yield tracker


@contextmanager
def new_run(name: str, tags: Mapping[str, str]) -> Iterator[MlflowTracker]:
    """One MLflow run, marked failed when the block raises.

    Raises:
        CoinferError: the tracking database or server cannot be used.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # creating tables is no news
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri()
    with _reaching_mlflow():
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            # Without this the file store's ./mlruns would depend on where the stage happened to run.
            local = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri() if uri.startswith(SQLITE) else None
            try:
                experiment_id = client.create_experiment(EXPERIMENT, artifact_location=local)
            except MlflowException:  # another stage was quicker
                experiment = client.get_experiment_by_name(EXPERIMENT)
                if experiment is None:
                    raise
                experiment_id = experiment.experiment_id
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
    with _closing(client, run):
        yield MlflowTracker(client, run)
