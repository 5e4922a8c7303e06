"""The evaluator that params and artefacts describe, in the driver or in a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.energy import PowerModel, board
from pipeline.costs.link import Link
from pipeline.data import load_split
from pipeline.params import Params, Power, parse_params
from pipeline.paths import DevicePaths
from pipeline.search.costing import Deployment
from pipeline.search.evaluator import Evaluator
from pipeline.search.executor import Executor, InProcess, Measure, Pool, Setup
from pipeline.search.inputs import load_problem
from pipeline.search.processes import ProcessFleet
from pipeline.search.ray_fleet import RayFleet
from pipeline.search.supernet import Supernet


def build_evaluator(params: Params, device: str) -> Evaluator:
    """The evaluator of `device`, from what the stages before left.

    Raises:
        CoinferError: an input is missing or does not fit.
    """
    paths, target = DevicePaths(device), params.device(device)
    problem = load_problem(params, device)
    profiles = DeviceProfile.load(paths.device_profile), DeviceProfile.load(paths.edge_profile)
    deployment = Deployment(*profiles, Link(target.link.rate_mbps, target.link.rtt_ms), power_of(target.power))
    supernet = Supernet.load(problem, paths.supernet)
    return Evaluator(problem, load_split("train"), load_split("validation"), deployment, params.run.seed, supernet)


def power_of(given: Power) -> PowerModel:
    """The board's published power, but for what is given."""
    known = given.model_dump(include={"cpu_w", "tx_w", "idle_w"}, exclude_none=True)
    return replace(board(given.board), **known)


def build_measure(params: Mapping[str, Any], device: str) -> Measure:
    """What a worker evaluates with; `params` as JSON brought them."""
    known = parse_params(dict(params))
    torch.set_num_threads(threads_of(known))
    return build_evaluator(known, device).measure


def threads_of(params: Params) -> int:
    """Torch threads of each of the workers."""
    return max(1, params.run.threads // params.search.workers)


def build_executor(params: Params, device: str, measure: Measure) -> Executor:
    """What `search.executor` and `search.workers` say; one local worker is the driver itself, with `measure`.

    Raises:
        CoinferError: no Ray cluster at `search.ray_address`.
    """
    settings = params.search
    if settings.executor == "local" and settings.workers == 1:
        return InProcess(measure)
    setup = Setup("pipeline.search.build:build_measure", {"params": params.model_dump(mode="json"), "device": device}, threads_of(params))
    fleet = ProcessFleet(setup) if settings.ray_address is None else RayFleet(setup, settings.ray_address)
    return Pool(fleet, settings.workers)
