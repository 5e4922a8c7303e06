"""What every searcher does: propose candidates, and hear what became of them."""

from __future__ import annotations

from typing import Protocol

from pipeline.search.candidate import Candidate
from pipeline.search.pareto import Trial


class Searcher(Protocol):
    """Proposes candidates. A search that was killed is rebuilt by telling a fresh searcher the kept trials again, in their order."""

    def ask(self, number: int) -> Candidate:
        """The proposal for trial `number`: a pure function of (seed, number, the trials told so far)."""
        ...

    def tell(self, trial: Trial) -> None:
        """Any trial, also one never asked for (a baseline, a kept one) or a failed one, whose measurement is None."""
        ...
