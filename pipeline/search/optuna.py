"""Optuna over the conditional space: every trial a pure function of (seed, number, earlier trials), kept in a journal as one line.

Killed at any point and started again, the search goes on with the trial it was in and ends with the same trials.
"""

from __future__ import annotations

import fcntl
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import CoinferError, ModelError, ParamsError
from pipeline.search.candidate import INPUT, OUTPUT, Candidate, Measurement, Precision
from pipeline.search.limits import Limits
from pipeline.search.pareto import OBJECTIVES, Trial, not_finite

RANDOM_TRIALS = 5  # after the baselines, before TPE has enough to learn from
POPULATION = 16
PROPOSALS_PER_TRIAL = 3  # a small space runs out of candidates not seen before

Measure = Callable[[Candidate, int], Measurement]


@dataclass(frozen=True)
class Space:
    """The candidates that can run.

    `codes` gives, for each cut a codec fits, the legal (code channels, strides); `rate_weights` are for codec `rate`, `points` (share of
    the code channels, bits) for `multi-rate`. `keep(cut)` gives, for each device block of a cut that has prunable channels, the legal kept fractions
    with 1.0 among them.
    """

    codes: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    bits: Sequence[int]
    qualities: Sequence[int]
    keep: Callable[[str], Mapping[str, Sequence[float]]]
    codec: str = "uniform"
    rate_weights: Sequence[float] = ()
    precision: Precision = "fp32"
    points: Sequence[tuple[float, int]] = ()

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """Ask for one parameter after the other, only for those that the earlier ones leave open."""
        cut = _pick(trial, "cut", [INPUT, *self.codes, OUTPUT])
        if cut == INPUT:
            return Candidate(cut, quality=_pick(trial, "quality", self.qualities))
        keep = tuple((block, _pick(trial, f"keep {block}", ratios)) for block, ratios in self.keep(cut).items())
        if cut == OUTPUT:
            return Candidate(cut, keep)
        channels, strides = self.codes[cut]
        code = {name: _pick(trial, name, values) for name, values in (("code_channels", channels), ("stride", strides), ("bits", self.bits))}
        rate = {"rate_weight": _pick(trial, "rate_weight", self.rate_weights)} if self.codec == "rate" else {}
        points = tuple((max(1, round(share * code["code_channels"])), bits) for share, bits in self.points)
        return Candidate(cut, keep, codec=self.codec, precision=self.precision, points=points, **code, **rate)

    def baselines(self) -> list[dict[str, Any]]:
        """Parameters of the unpruned device-only candidate and of every WebP quality."""
        cuts = [INPUT, *self.codes, OUTPUT]
        whole = {_name(f"keep {block}", ratios): 1.0 for block, ratios in self.keep(OUTPUT).items()}
        images = [{_name("cut", cuts): INPUT, _name("quality", self.qualities): quality} for quality in self.qualities]
        return [{_name("cut", cuts): OUTPUT, **whole}, *images]


def _name(name: str, choices: Sequence[Any]) -> str:
    # Optuna wants one set of choices per name; with them in the name, cuts with equal choices learn from each other.
    return f"{name} {'|'.join(map(str, choices))}"


def _pick(trial: optuna.trial.BaseTrial, name: str, choices: Sequence[Any]) -> Any:
    return trial.suggest_categorical(_name(name, choices), list(choices))


def search(space: Space, measure: Measure, limits: Limits, *, journal: Path, seed: int, trials: int, sampler: Literal["tpe", "nsga2"]) -> Iterator[Trial]:
    """Yield the trials in order: those `journal` keeps from an earlier run, then new ones, the baselines first.

    Ends after `trials` evaluations beyond the baselines. A proposal seen before takes over the earlier trial's result, is no
    evaluation, and makes the next proposal a random one. `measure(candidate, trial seed)` may raise ModelError, ValueError,
    ArithmeticError or RuntimeError or return NaN: the trial is then recorded as failed and the search goes on.

    Raises:
        CoinferError: the journal is damaged, cannot be written, or another search is using it; or a trial ran out of memory.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _alone(journal):
        kept = _open(journal)
        earlier = kept.trials
        try:
            known = [_row(frozen) for frozen in earlier]
        except (KeyError, TypeError, ValueError, ParamsError) as error:
            raise _damaged(journal) from error
        # Proposals come from a copy in memory, so that the journal never holds a trial that is not finished.
        study = optuna.create_study(directions=list(OBJECTIVES.values()))
        baselines = space.baselines()
        rows: list[Trial] = []
        first: dict[Candidate, Trial] = {}
        for number in itertools.count():
            evaluated = sum(row.duplicate_of is None for row in rows[len(baselines) :])
            if number >= len(baselines) and (evaluated >= trials or number >= len(baselines) + PROPOSALS_PER_TRIAL * trials):
                return
            if number < len(known):
                row = known[number]
                study.add_trial(earlier[number])
            else:
                sampler_seed, trial_seed = (int(word) for word in np.random.SeedSequence([seed, number]).generate_state(2))
                explore = number > len(baselines) and rows[-1].duplicate_of is not None
                study.sampler = _sampler("random" if explore else sampler, sampler_seed, len(baselines))
                if number < len(baselines):
                    study.enqueue_trial(baselines[number])
                trial = study.ask()
                candidate = space.suggest(trial)
                row = _evaluate(number, candidate, first.get(candidate), measure, trial_seed)
                _tell(study, trial, row, limits)
                try:
                    kept.add_trial(study.get_trials(deepcopy=False)[number])
                except OSError as error:
                    raise _cannot_write(journal, error) from error
            rows.append(row)
            first.setdefault(row.candidate, row)
            yield row


def _sampler(kind: Literal["tpe", "nsga2", "random"], seed: int, baselines: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    return optuna.samplers.TPESampler(n_startup_trials=baselines + RANDOM_TRIALS, seed=seed)


def _evaluate(number: int, candidate: Candidate, seen: Trial | None, measure: Measure, trial_seed: int) -> Trial:
    if seen is not None:
        return Trial(number, candidate, seen.measurement, duplicate_of=seen.number, failure=seen.failure)
    try:
        measurement = measure(candidate, trial_seed)
    except (ModelError, ValueError, ArithmeticError, RuntimeError) as error:
        if "memory" in str(error) and not isinstance(error, ModelError):  # torch has no class of its own for this; another day the trial may pass
            raise CoinferError(f"trial {number} ran out of memory ({_one_line(error)}); earlier trials are kept, free some and run again.") from error
        return Trial(number, candidate, None, failure=_one_line(error))
    wrong = not_finite(measurement)
    if wrong:
        return Trial(number, candidate, None, failure=f"{', '.join(wrong)} came out as no finite number")
    return Trial(number, candidate, measurement)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _tell(study: optuna.Study, trial: optuna.Trial, row: Trial, limits: Limits) -> None:
    trial.set_user_attr("candidate", row.candidate.to_dict())
    trial.set_user_attr("duplicate_of", row.duplicate_of)
    if row.measurement is None:
        trial.set_user_attr("failure", row.failure)
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr("measurement", row.measurement.to_dict())
    for name, missed in limits.violations(row.measurement).items():
        trial.set_constraint(name, missed)
    study.tell(trial, [getattr(row.measurement, name) for name in OBJECTIVES])


def _row(frozen: FrozenTrial) -> Trial:
    kept = frozen.user_attrs
    measurement = Measurement(**kept["measurement"]) if frozen.state is TrialState.COMPLETE else None
    return Trial(frozen.number, Candidate.from_dict(kept["candidate"]), measurement, kept["duplicate_of"], None if measurement else kept["failure"])


@contextmanager
def _alone(journal: Path) -> Iterator[None]:
    """Hold the study's folder; the kernel lets go of it when the process dies, however it dies."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        lock = (journal.parent / "lock").open("w")
    except OSError as error:
        raise _cannot_write(journal, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CoinferError(f"another search is writing {journal}; wait for it to end or stop it.") from None
        # Optuna's own lock outlives a killed process, and would hold this one up for half a minute.
        journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
        yield


def _open(journal: Path) -> optuna.Study:
    try:
        if journal.exists():
            _mend(journal)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        return optuna.create_study(study_name="search", storage=storage, directions=list(OBJECTIVES.values()), load_if_exists=True)
    except OSError as error:
        raise _cannot_write(journal, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise _damaged(journal) from error


def _mend(journal: Path) -> None:
    """Drop a last line that a power cut left unfinished; every finished line must be JSON."""
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with journal.open("r+b") as file:
            file.truncate(whole)
    for line in data[:whole].splitlines():
        json.loads(line)


def _cannot_write(journal: Path, error: OSError) -> CoinferError:
    return CoinferError(f"cannot write {journal}: {error.strerror or error}; free some space or check the permissions there, then run again.")


def _damaged(journal: Path) -> CoinferError:
    return CoinferError(f"the search's journal {journal} is damaged; delete {journal.parent} and run again to search afresh.")
