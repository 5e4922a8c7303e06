"""What a candidate must keep: accuracy, memory, latency at the rates a user states, energy and the bundle's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.costs.link import Link, link_ms, reply_frame_bytes
from pipeline.params import Params
from pipeline.search.candidate import Measurement

# Floors are differences of floats: 0.8 - 0.1 lies above 0.7.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class LatencyLimit:
    """At most `most_ms` end to end over each of `links`; with `probabilities` of the links, for a `share` of all requests.

    `reply_bytes` is the frame of an answer, see `link.reply_frame_bytes`; `own` says that the one link is the device's, which latency is predicted for.
    """

    most_ms: float
    links: tuple[Link, ...]
    reply_bytes: int
    probabilities: tuple[float, ...] = ()
    share: float = 1.0
    own: bool = False

    def of(self, measurement: Measurement) -> float:
        """The latency in ms that must not exceed `most_ms`: over the slowest link, or the quantile `share` over all.

        What sends nothing takes what it takes over any link.
        """
        own_ms = measurement.total_ms - measurement.link_ms
        if not measurement.frame_bytes:
            return own_ms
        taken = [own_ms + link_ms(measurement.frame_bytes, self.reply_bytes, link) for link in self.links]
        if not self.probabilities:
            return max(taken)
        reached = 0.0
        for ms, probability in sorted(zip(taken, self.probabilities, strict=True)):
            reached += probability
            if reached >= self.share - TOLERANCE:
                return ms
        return max(taken)

    @property
    def where(self) -> str:
        rates = ", ".join(f"{link.rate_mbps:g}" for link in self.links)
        return f"for {100 * self.share:g} % of requests at {rates} Mbit/s" if self.probabilities else f"at {rates} Mbit/s"


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep: an accuracy floor (top-1 on validation), the device's memory and the bundle's size (MB, 1e6 bytes), latency and energy."""

    floor: float
    memory_mb: float
    latency: LatencyLimit | None = None
    energy_mj: float | None = None
    bundle_mb: float | None = None

    @classmethod
    def of(cls, params: Params, device: str, reference_accuracy: float, classes: int) -> Limits:
        """Those that `objective` and `devices.DEVICE` state, for a backbone of `reference_accuracy` with `classes` classes."""
        target, objective = params.device(device), params.objective
        latency = None
        if objective.max_latency_ms is not None:
            rates = objective.latency_rates_mbps or [target.link.rate_mbps]
            links = tuple(Link(rate, target.link.rtt_ms) for rate in rates)
            probabilities = tuple(objective.latency_probabilities)
            latency = LatencyLimit(
                objective.max_latency_ms, links, reply_frame_bytes(classes), probabilities, objective.latency_share, not objective.latency_rates_mbps
            )
        floor = reference_accuracy - objective.max_accuracy_drop
        return cls(floor, target.memory_mb, latency, objective.max_energy_mj, objective.max_bundle_mb)

    @property
    def budget_ms(self) -> float | None:
        """The latency that a candidate may be predicted to take: that of a limit at the device's own link, which is what is predicted for."""
        return self.latency.most_ms if self.latency and self.latency.own else None

    def violations(self, measurement: Measurement) -> dict[str, float]:
        """How far each limit is missed, at most 0 where it is kept: points of accuracy, all else as a fraction of what is allowed."""
        missed = {"accuracy": self.floor - measurement.accuracy - TOLERANCE, "memory": measurement.device_memory_mb / self.memory_mb - 1}
        if self.latency:
            missed["latency"] = self.latency.of(measurement) / self.latency.most_ms - 1 - TOLERANCE
        if self.energy_mj is not None:
            missed["energy"] = measurement.energy_mj / self.energy_mj - 1 - TOLERANCE
        if self.bundle_mb is not None:
            missed["bundle"] = measurement.bundle_mb / self.bundle_mb - 1 - TOLERANCE
        return missed

    def allow(self, measurement: Measurement) -> bool:
        return all(missed <= 0 for missed in self.violations(measurement).values())

    def described(self, name: str, measurement: Measurement) -> str:
        """What `measurement` has against the limit `name`, and the parameter that sets it."""
        if name == "accuracy":
            return f"accuracy {measurement.accuracy:.4f} lies below the floor {self.floor:.4f} (objective.max_accuracy_drop)"
        if name == "memory":
            return f"it needs {measurement.device_memory_mb:.3g} MB of the device's {self.memory_mb:.3g} MB (memory_mb)"
        if name == "energy":
            return f"it takes {measurement.energy_mj:.3g} mJ of {self.energy_mj:.3g} mJ (objective.max_energy_mj)"
        if name == "bundle":
            return f"its bundle holds {measurement.bundle_mb:.3g} MB of {self.bundle_mb:.3g} MB (objective.max_bundle_mb)"
        assert self.latency is not None
        return f"it takes {self.latency.of(measurement):.4g} ms of {self.latency.most_ms:.4g} ms {self.latency.where} (objective.max_latency_ms)"


def binding(measured: Sequence[Measurement], limits: Limits) -> str:
    """Which limits keep all of `measured` out: those that none of them keeps; else those without which some would do; else all that are missed."""
    missed = [{name for name, value in limits.violations(measurement).items() if value > 0} for measurement in measured]
    never = set.intersection(*missed)
    if never:
        return f"none keeps the limit on {' or on '.join(sorted(never))}"
    alone = {name: sum(names == {name} for names in missed) for name in sorted(set.union(*missed))}
    alone = {name: count for name, count in alone.items() if count}
    if alone:
        return " and ".join(f"{count} would do without the limit on {name}" for name, count in alone.items())
    return f"each limit is kept by some, but none leaves out fewer than two of {', '.join(sorted(set.union(*missed)))}"
