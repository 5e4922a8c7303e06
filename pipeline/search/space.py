"""The search space: what there is to choose, asked for one parameter after the other, so that a choice that cannot run is never offered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.runtime.images import Format
from pipeline.search.candidate import CODECS, INPUT, OUTPUT, Candidate, Precision

WITH_BITS = ("uniform", "codebook", "rate")  # codecs whose bits are chosen; a byte holds a symbol of the others
BYTE = 8

Pick = Callable[[str, Sequence[Any]], Any]  # (parameter name, its choices) -> one of the choices


def _nothing(cut: str) -> dict[str, Collection[str]]:
    return {}


@dataclass(frozen=True)
class Space:
    """The candidates that can run, each network once.

    `codes` gives, for each cut a codec fits, the legal (code channels, strides), `images` what the image itself may be sent as. `bits` are for those of the
    `codecs` whose symbols have a choice of them, `rate_weights` for `rate`, `points` (share of the code channels, bits) for `multi-rate`. `keep(cut)` gives,
    in order of execution, each group of channels of the device half that can be pruned with its legal kept fractions, ascending and 1.0 last, and before
    its first group each block that may be dropped with (0.0, 1.0). `inside(cut)` names, for such a block, the groups that go with it and are then not
    asked for. At one cut a parameter has the same choices whatever was chosen before it, if it is asked for.
    """

    codes: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    bits: Sequence[int]
    images: Sequence[tuple[Format, int]]
    keep: Callable[[str], Mapping[str, Sequence[float]]]
    codecs: Sequence[str] = CODECS[:1]
    rate_weights: Sequence[float] = ()
    precisions: Sequence[Precision] = ("fp32",)
    points: Sequence[tuple[float, int]] = ()
    inside: Callable[[str], Mapping[str, Collection[str]]] = _nothing

    @property
    def cuts(self) -> list[str]:
        """The cuts there is something to search at. Sending the image is none: every way to do so is a baseline, and known before the first question."""
        return [*self.codes, OUTPUT]

    def suggest(self, pick: Pick) -> Candidate:
        """Ask for one parameter after the other, only for those that the earlier ones leave open."""
        return self.suggest_at(pick("cut", self.cuts), pick)

    def suggest_at(self, cut: str, pick: Pick) -> Candidate:
        """As `suggest`, the cut being given: `image`; or `keep GROUP` of each group, then `codec` where there are several, what `asked` of it says, and
        `precision` where there are several.
        """
        if cut == INPUT:
            image_format, quality = pick("image", self.images)
            return Candidate(cut, quality=quality, image_format=image_format)
        keep: dict[str, float] = {}
        gone: set[str] = set()
        for name, ratios in self.keep(cut).items():
            if name in gone:
                continue
            keep[name] = pick(f"keep {name}", ratios)
            if keep[name] == 0:
                gone.update(self.inside(cut).get(name, ()))
        if cut == OUTPUT:
            return Candidate(cut, tuple(keep.items()))
        codec = pick("codec", self.codecs) if len(self.codecs) > 1 else self.codecs[0]
        code = {"bits": BYTE} | {name: pick(name, values) for name, values in self.asked(cut, codec).items()}
        return Candidate(
            cut,
            tuple(keep.items()),
            codec=codec,
            precision=pick("precision", self.precisions) if len(self.precisions) > 1 else self.precisions[0],
            points=tuple((max(1, round(share * code["code_channels"])), bits) for share, bits in self.points) if codec == "multi-rate" else (),
            **code,
        )

    def asked(self, cut: str, codec: str) -> dict[str, Sequence[Any]]:
        """What there is to choose of `codec` at `cut`, parameter -> choices: `code_channels`, `stride`, `bits` where it has a choice, its `rate_weight`."""
        channels, strides = self.codes[cut]
        found: dict[str, Sequence[Any]] = {"code_channels": channels, "stride": strides}
        if codec in WITH_BITS:
            found["bits"] = self.bits
        if codec == "rate":
            found["rate_weight"] = self.rate_weights
        return found

    def choices(self, candidate: Candidate) -> dict[str, Any]:
        """Parameter name -> what `candidate` has, for all that `suggest` would ask for: `suggest(lambda name, _: choices[name])` gives it again."""
        keep, found = dict(candidate.keep), dict[str, Any]()

        def value(name: str, _: Sequence[Any]) -> Any:
            if name.startswith("keep "):
                found[name] = keep.get(name.removeprefix("keep "), 1.0)
            else:
                found[name] = (candidate.image_format, candidate.quality) if name == "image" else getattr(candidate, name)
            return found[name]

        self.suggest(value)
        return found

    def baselines(self) -> list[Candidate]:
        """The unpruned device-only candidate, and the image itself in every format and quality."""
        return [Candidate(OUTPUT), *(Candidate(INPUT, quality=quality, image_format=image_format) for image_format, quality in self.images)]
