"""Limits that nothing can keep, refused before the first trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import CoinferError, ModelError
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.costing import Costing
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial, unmet
from pipeline.search.space import Space


def refuse_the_impossible(space: Space, costing: Costing, limits: Limits) -> None:
    """Compare the limits with the least that candidates of every kind can have (`Costing.least`); the first kind that may keep them ends it.

    Where a half is such that nothing can be foreseen of it, the search has to find out.

    Raises:
        CoinferError: nothing can keep all limits, by these bounds; names those that bind, and the nearest candidates. Accuracy is none of them.
        ProfileError: a profile lacks an image format.
    """
    found: dict[Measurement, Trial] = {}  # of those that are foreseen alike the first, so that what is named differs
    try:
        for number, candidate in enumerate((*space.baselines(), *(candidate for cut in space.cuts for candidate in _narrowest(space, cut)))):
            least = costing.least(candidate)
            found.setdefault(least, Trial(number, candidate, least))
            if limits.allow(least):
                return
    except ModelError:
        return
    raise CoinferError(
        f"nothing that can be searched is within the limits, even with the least that is foreseen of each: {unmet(list(found.values()), limits)}. "
        "Loosen a limit, or allow stronger pruning."
    )


def _narrowest(space: Space, cut: str) -> Iterator[Candidate]:
    """Every code at `cut` behind the half that keeps least."""
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        candidate, others = _along(space, cut, waiting.pop())
        waiting.extend(others)
        yield candidate


def _along(space: Space, cut: str, path: tuple[int, ...]) -> tuple[Candidate, list[tuple[int, ...]]]:
    """The candidate of the choices with these numbers, the first where they end; and the paths that leave there."""
    taken: list[int] = []
    others: list[tuple[int, ...]] = []

    def pick(name: str, choices: Sequence[Any]) -> Any:
        if name.startswith("keep ") or name == "rate_weight":  # fractions rise; what a codec is trained for costs nothing
            return choices[0]
        if len(taken) >= len(path):
            others.extend((*taken, other) for other in range(1, len(choices)))
        taken.append(path[len(taken)] if len(taken) < len(path) else 0)
        return choices[taken[-1]]

    return space.suggest_at(cut, pick), others
