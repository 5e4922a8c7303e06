"""The loop of every search: baselines, then what the searcher asks for, evaluated by one worker or many and kept in a journal (METHODS 5)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.search.candidate import Candidate
from pipeline.search.executor import Executor, Job, Outcome
from pipeline.search.journal import Journal, journal
from pipeline.search.pareto import Trial
from pipeline.search.searcher import Searcher
from pipeline.search.space import Space

PROPOSALS_PER_TRIAL = 3  # a small space runs out of candidates not seen before


def search(space: Space, searcher: Searcher, executor: Executor, *, journal_file: Path, seed: int, trials: int) -> Iterator[Trial]:
    """Yield trials as they finish: those kept from an earlier run, then new ones, the baselines first.

    Ends after `trials` evaluations beyond the baselines, or three times as many proposals. A proposal seen before, finished or in flight, takes over that
    trial's result and is no evaluation. What fails (see `Outcome`) or measures NaN is a failed trial, and the search goes on. Trial seeds depend on `seed`
    and the trial's number alone, so where proposals do too the trials are the same for any number of workers; with one worker they always are.

    Raises:
        CoinferError: the journal is damaged, cannot be written, or another search is using it; or no trial can be evaluated, as when memory runs out.
    """
    with journal(journal_file) as book:
        yield from _Search(space, searcher, executor, book, seed, trials).run()


class _Search:
    def __init__(self, space: Space, searcher: Searcher, executor: Executor, book: Journal, seed: int, trials: int) -> None:
        self.searcher, self.executor, self.book, self.seed, self.trials = searcher, executor, book, seed, trials
        self.baselines = space.baselines()
        self.kept = {trial.number: trial for trial in book.trials}
        self.told: set[int] = set()
        self.number = self.evaluations = 0
        self.first: dict[Candidate, Trial | None] = {}  # None: in flight
        self.waiting: dict[Candidate, list[int]] = {}  # proposals of what is in flight
        self.flying: dict[int, Job] = {}
        self.held = False  # until something finishes

    def run(self) -> Iterator[Trial]:
        yield from self._replay()
        while True:
            self.held = False
            while not self.held and len(self.flying) < self.executor.workers and self._more():
                yield from self._start()
            if not self.flying:
                return
            yield from self._finish(self.executor.next())

    def _replay(self) -> Iterator[Trial]:
        """What the journal holds of this search, told in the order in which it finished. (A search of more trials may have filled it.)"""
        end = evaluations = 0
        while end <= max(self.kept, default=-1) and (end < len(self.baselines) or evaluations < self.trials):
            trial = self.kept.get(end)
            evaluations += end >= len(self.baselines) and (trial is None or trial.duplicate_of is None)
            end += 1
        for trial in self.book.trials:
            if trial.number < end:
                yield self._tell(trial)

    def _more(self) -> bool:
        """Whether there is another trial to start; passes over those that were replayed."""
        while self.number in self.told and not self._enough(self.number):
            self._count(self.kept[self.number].duplicate_of is None)
        return not self._enough(self.number)

    def _enough(self, number: int) -> bool:
        past = number - len(self.baselines)
        return past >= 0 and (self.evaluations >= self.trials or past >= PROPOSALS_PER_TRIAL * self.trials)

    def _count(self, evaluation: bool) -> None:
        self.evaluations += evaluation and self.number >= len(self.baselines)
        self.number += 1

    def _start(self) -> Iterator[Trial]:
        """Start the next trial; yields it where it is known already."""
        number = self.number
        if (kept := self.kept.get(number)) is not None:
            self._count(kept.duplicate_of is None)
            yield self._tell(kept)
            return
        candidate = self.baselines[number] if number < len(self.baselines) else self.searcher.ask(number)
        self._count(candidate not in self.first)
        if candidate not in self.first:
            self.first[candidate] = None
            self.flying[number] = Job(number, candidate, int(np.random.SeedSequence([self.seed, number]).generate_state(2)[1]))
            self.executor.submit(self.flying[number])
        elif (seen := self.first[candidate]) is None:
            self.waiting.setdefault(candidate, []).append(number)
            self.held = True  # a searcher that is sure of itself would go on to propose just that
        else:
            yield self._done(_repeated(number, seen))

    def _finish(self, outcome: Outcome) -> Iterator[Trial]:
        candidate = self.flying.pop(outcome.number).candidate
        trial = Trial(outcome.number, candidate, outcome.measurement, failure=outcome.failure)
        yield self._done(trial)
        for number in self.waiting.pop(candidate, ()):
            yield self._done(_repeated(number, trial))

    def _done(self, trial: Trial) -> Trial:
        self.book.append(trial)
        return self._tell(trial)

    def _tell(self, trial: Trial) -> Trial:
        self.searcher.tell(trial)
        self.told.add(trial.number)
        if trial.duplicate_of is None:
            self.first[trial.candidate] = trial
        return trial


def _repeated(number: int, seen: Trial) -> Trial:
    return Trial(number, seen.candidate, seen.measurement, duplicate_of=seen.number, failure=seen.failure)
