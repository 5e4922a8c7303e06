"""The candidates that can run, and how a searcher asks for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.search.candidate import INPUT, OUTPUT, Candidate

Pick = Callable[[str, Sequence[Any]], Any]


@dataclass(frozen=True)
class Space:
    """The candidates that can run.

    `codes` gives, for each cut a codec fits, the legal (code channels, strides); `images` the edge-only (format, quality); `keep(cut)` the
    legal kept fractions of each prunable group of the device half, ascending, 1.0 last. `rate_weights` are for codec `rate`, `points` (share of
    the code channels, bits) for `multi-rate`.
    """

    codes: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    bits: Sequence[int]
    images: Sequence[tuple[str, int]]
    keep: Callable[[str], Mapping[str, Sequence[float]]]
    codec: str = "uniform"
    rate_weights: Sequence[float] = ()
    precisions: Sequence[str] = ("fp32",)
    points: Sequence[tuple[float, int]] = ()

    def suggest(self, pick: Pick) -> Candidate:
        """Ask `pick` (parameter name, its choices) for one parameter after the other, only for those that the earlier ones leave open."""
        return self.suggest_at(pick("cut", [*([INPUT] if self.images else []), *self.codes, OUTPUT]), pick)

    def suggest_at(self, cut: str, pick: Pick) -> Candidate:
        """The same with the cut given."""
        if cut == INPUT:
            return Candidate(cut, quality=pick("image", self.images)[1])
        keep = tuple((group, pick(f"keep {group}", ratios)) for group, ratios in self.keep(cut).items())
        if cut == OUTPUT:
            return Candidate(cut, keep)
        channels, strides = self.codes[cut]
        code = {name: pick(name, values) for name, values in (("code_channels", channels), ("stride", strides), ("bits", self.bits))}
        if self.codec == "rate":
            code["rate_weight"] = pick("rate_weight", self.rate_weights)
        if len(self.precisions) > 1:
            code["precision"] = pick("precision", self.precisions)
        else:
            code["precision"] = self.precisions[0]
        points = tuple((max(1, round(share * code["code_channels"])), bits) for share, bits in self.points)
        return Candidate(cut, keep, codec=self.codec, points=points, **code)

    def choices(self, candidate: Candidate) -> dict[str, Any]:
        """Parameter name -> what `candidate` has: suggest(lambda name, _: choices[name]) gives it again."""
        if candidate.kind == "edge-only":
            return {"cut": INPUT, "image": next(image for image in self.images if image[1] == candidate.quality)}
        kept = dict(candidate.keep)
        chosen = {"cut": candidate.cut} | {f"keep {group}": kept.get(group, 1.0) for group in self.keep(candidate.cut)}
        if candidate.kind == "split":
            chosen |= {name: getattr(candidate, name) for name in ("code_channels", "stride", "bits", "rate_weight", "precision")}
        return chosen

    def baselines(self) -> list[Candidate]:
        """The whole backbone on the device, and every image."""
        return [Candidate(OUTPUT), *(Candidate(INPUT, quality=quality) for _, quality in self.images)]
