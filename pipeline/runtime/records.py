"""Classifying what a device sees: one JSON record a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.costs.link import wire_bytes
from pipeline.errors import DataError
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.device import Answer, DeviceHalf
from pipeline.runtime.fallback import Fallback, check_deadline
from pipeline.runtime.pictures import pictures
from pipeline.runtime.transport import Transport


def classify(
    bundle: Bundle,
    edge: Transport | None,
    source: str,
    threads: int = 1,
    point: int = 0,
    deadline_ms: float = 1000.0,
) -> Iterator[dict[str, Any]]:
    """One JSON record per picture of `source` (see `pictures`).

    A record holds file or frame, label, probability, ms by part, frame_bytes, wire_bytes and the path taken. Without an edge, or where it does not answer
    before `deadline_ms` or refuses, the device classifies alone (`edge_error` says why; see `Fallback`); an unreadable image gives its name and error,
    and the next one follows.

    Raises:
        DataError: there is no such source, it holds no picture, or a camera or stream ends; at the end, if not one picture could be read.
        ParamsError: a deadline that is not positive.
    """
    check_deadline(deadline_ms)
    device = DeviceHalf(bundle, threads, point=point)
    fallback = Fallback(device, edge, deadline_ms) if edge is not None and bundle.kind != "device-only" else None
    is_any_read = False
    for shot in pictures(source):
        if shot.picture is None:
            yield shot.name | {"error": shot.error}
            continue
        try:
            answer, why = fallback.classify(shot.picture) if fallback else (device.classify_locally(shot.picture), None)
        except DataError as error:
            yield shot.name | {"error": str(error)}
            continue
        is_any_read = True
        record = shot.name | record_of(bundle, answer)
        yield record if why is None else record | {"edge_error": why}
    if not is_any_read:
        raise DataError(f"not one picture of {source} could be read; replace them, or give another source.")


def record_of(bundle: Bundle, answer: Answer) -> dict[str, Any]:
    """What a record says of an answer, whatever picture it is for."""
    exponentials = np.exp(answer.logits - answer.logits.max())
    best = int(answer.logits.argmax())
    record = {"label": bundle.classes[best], "probability": round(float(exponentials[best] / exponentials.sum()), 6)}
    record |= {name: round(ms, 3) for name, ms in answer.parts.items()}
    return record | {"frame_bytes": answer.frame_bytes, "wire_bytes": wire_bytes(answer.frame_bytes), "path": answer.path}
