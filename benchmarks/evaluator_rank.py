"""How well a supernet's cheap trials order candidates that full fine-tuning would tell apart; `benchmarks/search.py` runs this and writes the results."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr
from torch import nn

from benchmarks.fronts import Place, evaluators, lanes_of_one_thread, prepared
from benchmarks.results_file import figure
from models.channel_plan import rebuild
from models.codec import RateCodec
from models.cutting import split
from pipeline.data import Split, load_split
from pipeline.distilling import Distiller
from pipeline.errors import CoinferError
from pipeline.inference import accuracy, recalibrated
from pipeline.networks import split_network
from pipeline.params import Finetune, load_params
from pipeline.search.candidate import OUTPUT, Candidate
from pipeline.search.evaluator import Evaluator
from pipeline.search.problem import Problem
from pipeline.split_distilling import SplitDistiller
from pipeline.training import DataModule, fit

CANDIDATES, SEED, SHARED_BY = 24, 0, 200
KEPT = Path("judged")
WITHIN = 0.05  # of the best: what is farther off is easily told apart
STATISTICS_IMAGES = 1024
MOST_DRAWS = 40  # for each candidate wanted


@dataclass(frozen=True)
class Estimate:
    """What a trial says of a candidate, and the process seconds that it took."""

    candidate: Candidate
    accuracy: float
    payload_bits: float
    trial_s: float


@dataclass(frozen=True)
class Judged:
    """One candidate: what the trial said, what full fine-tuning gave (top-1 of the same validation images), and what both cost in process seconds."""

    candidate: dict[str, Any]
    estimated: float
    finetuned: float
    trial_s: float
    finetune_s: float


def random_candidate(problem: Problem, rng: np.random.Generator) -> Candidate:
    """A split or pruned device-only candidate of the space: every choice uniform."""

    def pick(values: Sequence[Any]) -> Any:
        return values[int(rng.integers(len(values)))]

    space = problem.space()
    cut = pick([*space.codes, *([OUTPUT] if problem.legal_keep(OUTPUT) else [])])
    return space.suggest_at(cut, lambda _, choices: pick(choices))


def candidates_near_the_best(evaluator: Evaluator, count: int, seed: int) -> list[Estimate]:
    """`count` random candidates that the trials put within 5 points of the best of all drawn.

    Raises:
        CoinferError: there are too few in the space.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[Candidate, Estimate] = {}
    for _ in range(MOST_DRAWS * count):
        candidate = random_candidate(evaluator.problem, rng)
        if candidate in drawn or not evaluator.is_estimate(candidate):
            continue
        start = time.process_time()
        measured = evaluator.measure(candidate, 0)
        drawn[candidate] = Estimate(candidate, measured.accuracy, measured.payload_bits, time.process_time() - start)
        best = max(found.accuracy for found in drawn.values())
        near = [found for found in drawn.values() if found.accuracy >= best - WITHIN]
        if len(near) >= count and len(drawn) >= 2 * count:  # so that the best is not the best of a few
            return near[:count]
    raise CoinferError(f"of {len(drawn)} candidates drawn fewer than {count} lie within {WITHIN:.0%} of the best; widen search.code_channels or search.keep.")


def finetuned(problem: Problem, candidate: Candidate, train: Split, settings: Finetune, label_smoothing: float, seed: int, promised_bits: float) -> nn.Module:
    """`candidate` trained for `settings.epochs` as the stage `finetune` does: from the backbone's weights and a fresh codec, on one thread.

    Not so the epochs behind the frozen device half, which would make this several times as long.

    Codec `rate` is held to the bits that the trial `promised`, as there.
    """
    torch.manual_seed(seed)
    plan, teacher = problem.plan(candidate.cut, dict(candidate.keep)), copy.deepcopy(problem.backbone)
    if candidate.kind == "device-only":
        whole = recalibrated(rebuild(problem.head(OUTPUT), plan), train[0][:STATISTICS_IMAGES])
        lesson = Distiller(whole, teacher, settings, label_smoothing)
    else:
        network = split_network(problem.backbone, problem.example, candidate, plan, problem.codec)
        if isinstance(network.codec, RateCodec):
            network.codec.budget_bits = promised_bits
        if plan.kept:
            recalibrated(network.head, train[0][:STATISTICS_IMAGES])
        lesson = SplitDistiller(network, split(teacher, problem.example, candidate.cut), settings, label_smoothing)
    data = DataModule(train, (train[0][:1], train[1][:1]), settings, seed)
    options: dict[str, Any] = {"threads": 1, "precision": settings.precision, "log": lambda row: None}
    fit(lesson, data, name=f"finetune {candidate.label()}", epochs=settings.epochs, checkpoint_dir=None, **options)
    return lesson.network


def judged(problem: Problem, found: Estimate, train: Split, validation: Split, settings: Finetune, label_smoothing: float, seed: int) -> Judged:
    """One row of the comparison: `found` fine-tuned, and judged by `validation`."""
    start = time.process_time()
    network = finetuned(problem, found.candidate, train, settings, label_smoothing, seed, found.payload_bits)
    finetune_s = time.process_time() - start
    return Judged(found.candidate.to_dict(), found.accuracy, accuracy(network, validation), found.trial_s, finetune_s)


def summary(rows: Sequence[Judged], training_s: float = 0.0, shared_by: int = SHARED_BY) -> dict[str, float]:
    """Rank correlations, and what a trial costs as a share of fine-tuning, also with the supernet's `training_s` shared by so many trials."""
    estimated, tuned = ([getattr(row, name) for row in rows] for name in ("estimated", "finetuned"))
    trial_s, finetune_s = (float(np.median([getattr(row, name) for row in rows])) for name in ("trial_s", "finetune_s"))
    return {
        "spearman": float(spearmanr(estimated, tuned).statistic),
        "kendall": float(kendalltau(estimated, tuned).statistic),
        "cost_ratio": trial_s / finetune_s,
        "cost_ratio_shared": (trial_s + training_s / shared_by) / finetune_s,
    }


def compared(place: Place) -> dict[str, Any]:
    """24 random candidates of `place` that trials put near the best, each fine-tuned as the example's params say; two at a time, kept one by one."""
    params = prepared(place)
    evaluator, _ = evaluators(place)
    KEPT.mkdir(exist_ok=True)
    drawn = KEPT / "drawn.json"
    if not drawn.exists():
        found = candidates_near_the_best(evaluator, CANDIDATES, SEED)
        drawn.write_text(json.dumps([{**asdict(estimate), "candidate": estimate.candidate.to_dict()} for estimate in found]))
    with lanes_of_one_thread() as lanes:
        rows = []
        for future in [lanes.submit(_compared, place, number) for number in range(CANDIDATES)]:
            rows.append(future.result())
            print(f"evaluator: {len(rows)} of {CANDIDATES} fine-tuned", file=sys.stderr, flush=True)
    return {"judged": rows, "epochs": params.finetune.epochs, "supernet_s": json.loads(Path("supernet-seconds.json").read_text())}


def _compared(place: Place, number: int) -> dict[str, Any]:
    evaluator, whole = evaluators(place)
    kept = KEPT / f"{number}.json"
    if not kept.exists():
        params, fields = load_params(), json.loads((KEPT / "drawn.json").read_text())[number]
        estimate = Estimate(**{**fields, "candidate": Candidate.from_dict(fields["candidate"])})
        row = judged(evaluator.problem, estimate, load_split("train"), whole.validation, params.finetune, params.pretrain.label_smoothing, SEED)
        kept.write_text(json.dumps(asdict(row)))
    return json.loads(kept.read_text())  # type: ignore[no-any-return]


def figures(raw: dict[str, Any]) -> dict[str, Any]:
    rows = [Judged(**row) for row in raw["judged"]]
    found, tuning = summary(rows, raw["supernet_s"]), f"fine-tuning all for {raw['epochs']} epochs, without those behind the frozen device half"
    said = {
        "spearman": f"of the accuracy that trials give and that after {tuning}, candidates within {100 * WITHIN:g} points of the best trial",
        "kendall": "tau-b, of the same",
        "cost_ratio": f"processor seconds of a trial over those of {tuning}, medians",
        "cost_ratio_shared": f"the same, with the supernet's training shared by {SHARED_BY} trials",
    }
    return {f"evaluator_{key}": figure(found[key], "", how, n=len(rows)) for key, how in said.items()}
