"""A results file whose parts are measured one at a time or all (`--part`); what it holds of the others is kept."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results_file import RESULTS, figure, write

Raw = dict[str, Any]


class Part(NamedTuple):
    """What measures it, and what makes figures of that."""

    measure: Callable[[], Raw]
    figures: Callable[[Raw], Raw]


def figures_of(raw: Mapping[str, Raw], parts: Mapping[str, Part], asked_for: Sequence[str]) -> Raw:
    """Of the parts that `raw` has; what is asked for and not measured yet has no value."""
    found: Raw = {}
    for name, part in parts.items():
        if name in raw:
            found |= part.figures(raw[name])
    return found | {key: figure(None, "", "not run yet", n=0) for key in asked_for if key not in found}


def run(name: str, parts: Mapping[str, Part], asked_for: Sequence[str], *, dataset: str, seeds: Sequence[int], description: str | None) -> None:
    """Measure the parts that the command line names and write results/`name`.json after each.

    Args:
        asked_for: figures that the issue names.
        dataset: in words.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--part", choices=parts, action="append", help="only this; may be given several times")
    chosen = parser.parse_args().part or list(parts)
    here, file = Path.cwd(), RESULTS / f"{name}.json"
    raw: Raw = json.loads(file.read_text())["raw"] if file.exists() else {}
    for part in chosen:
        raw[part] = parts[part].measure()
        os.chdir(here)  # some measure in a folder of their own
        found = figures_of(raw, parts, asked_for)
        write(name, dataset={"name": dataset, "hash": "none"}, seeds=list(seeds), figures=found, raw=raw)
