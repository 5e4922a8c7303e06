"""Makes the tables between the markers in `TARGETS` and the pictures beside results/*.json from those files, and logs these to MLflow: `make readme`."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.end_to_end import RATES_MBPS, RTTS_MS, SLOWDOWNS
from benchmarks.results_file import RESULTS, ROOT, track
from benchmarks.search_pictures import fronts as all_fronts
from benchmarks.search_pictures import predicted, progress, ranked
from benchmarks.search_tables import search_tables
from benchmarks.three_step_figures import pooled
from benchmarks.three_step_pictures import against_macs, fronts, over_links, over_noise, short_name
from benchmarks.three_step_points import CUTS, VECTOR
from pipeline.files import atomic_path, atomic_write_text
from pipeline.plots import latency_against_rate, latency_breakdown
from pipeline.report import heading
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.figure import pareto_figure
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial

BLOCKS = {"quickstart": "quickstart-digits", "cifar10": "cifar10-resnet20", "three-step": "three_step", "pruning": "pruned-half", "search": "search"}
TARGETS = ("README.md", "docs/split.md", "docs/search.md")
IN_DOCS = ("search",)  # whose pictures are shown one folder down
WORDS = ("cut", "codec", "precision", "image_format")  # columns of trials.csv that are no JSON
WAYS = ("split", "device_only", "edge_only")


def table(name: str, results: dict[str, Any]) -> str:
    """The Markdown table of one results file."""
    return {"three_step": three_step_table, "pruned-half": pruned_half_table, "search": search_tables}.get(name, pipeline_table)(results)


def pruned_half_table(results: dict[str, Any]) -> str:
    """How much faster a device half with half of its channels is, a row for each backbone and cut."""
    figures, machine = results["figures"], results["machine"]
    rows = []
    for key, speedup in figures.items():
        kind, _, half = key.partition(".")
        if kind == "speedup":
            (backbone, _, cut), size = half.partition("."), speedup["how"].rpartition(", ")[2]
            low, high = speedup["spread"]
            rows.append(f"| {backbone} | {cut} | {size} | {figures[f'macs_kept.{half}']['value']:.2f} | {speedup['value']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(
        [
            "| backbone | cut | input | MACs left | times as fast (quartiles) |",
            "|---|---|---:|---:|---:|",
            *rows,
            "",
            f"Half of the channels of every group, in multiples of 8; ONNX Runtime, one thread, both halves in turns, on {machine['cpu']} "
            f"(commit {results['commit'][:8]}, {results['date']}).",
        ]
    )


def three_step_table(results: dict[str, Any]) -> str:
    """What each codec and image format costs at most one point below the reference, a column for each cut."""
    figures, raw = results["figures"], results["raw"]
    cuts = CUTS["resnet20"]

    def cell(value: float | None, form: str = ".0f") -> str:
        return "-" if value is None else f"{value:{form}}"

    rows = [
        ("payload bits, ours", [cell(figures[f"bits_at_1pt.resnet20.{where}"]["value"]) for where in cuts]),
        ("frame bytes, ours", [cell(figures[f"frame_bytes_at_1pt.resnet20.{where}"]["value"], ".1f") for where in cuts]),
        ("over BottleNet++, uncoded", [cell(figures[f"bits_over_bottlenetpp.{where}"]["value"], ".3f") for where in cuts]),
        ("over BottleNet++, entropy-coded", [cell(figures[f"bits_over_bottlenetpp_coded.{where}"]["value"], ".3f") for where in cuts]),
        ("over WebP edge-only, plain or trained on it", [cell(figures[f"bits_over_webp.{where}"]["value"], ".3f") for where in cuts]),
        ("ResNet-56: payload bits, ours", [cell(figures[f"bits_at_1pt.resnet56.{where}"]["value"]) for where in cuts]),
    ]
    best = raw["references"].get("resnet20")
    reference = f" Its reference classifies {100 * best['test']:.2f} % of the test images." if best else ""
    machine = results["machine"]
    return "\n".join(
        [
            f"{results['dataset']['name']}, ResNet-20 cut after each of its stages; the cheapest configuration at most 1 point below the unsplit network on "
            f"validation, sizes and accuracy on test.{reference} A dash: not run yet, or it lost more than 1.25 points on test.",
            "",
            f"| at most 1 point below | {' | '.join(f'{where} ({cut})' for where, cut in cuts.items())} |",
            f"|---|{'---:|' * len(cuts)}",
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
            "",
            *end_to_end_lines(figures, raw),
            *vector_lines(raw),
            f"{len(raw['points'])} points so far, on {machine['cores']} cores of {machine['cpu']} (commit {results['commit'][:8]}, {results['date']}, "
            f"seed {', '.join(map(str, results['seeds']))}).",
        ]
    )


def end_to_end_lines(figures: dict[str, Any], raw: dict[str, Any]) -> list[str]:
    """Where splitting pays and where it does not, of the whole grid of devices and links."""
    if "end_to_end" not in raw:
        return []
    picks = Counter(short_name(place["pick"]) for place in raw["end_to_end"]["grid"])
    found = {slowdown: figures[f"end_to_end_best_speedup.x{slowdown:g}"]["value"] for slowdown in SLOWDOWNS}
    ratios = ", ".join(f"{value:.2f} at {slowdown:g} times" for slowdown, value in found.items() if value)
    picked = ", ".join(f"{name} at {count}" for name, count in picks.most_common())
    ours = sum(place["real_cut"] for place in raw["end_to_end"]["grid"])
    return [
        f"From image to answer, over {sum(picks.values())} places (devices {', '.join(f'{slowdown:g}' for slowdown in SLOWDOWNS)} times slower than one core, "
        f"round trips of {' and '.join(f'{rtt:g}' for rtt in RTTS_MS)} ms, {RATES_MBPS[0]:g} to {RATES_MBPS[-1]:g} Mbit/s), the fastest predicted is: "
        f"{picked}; so at 32 pixels a split of ours pays at {ours} of them."
        + (f" The best baseline takes this many times as long as our best split, where that is best: {ratios}." if ratios else ""),
        "",
    ]


def vector_lines(raw: dict[str, Any]) -> list[str]:
    """What is classification on the device, so in no table: the pooled vector's code."""
    for row in pooled(raw["points"]):
        if row["point"].get("cut") == VECTOR and "test" in row:
            bits, share = row["test"]["payload_bits"]["mean"], row["test"]["accuracy"]
            return [f"Pooled to a vector on the device, where little is left for the edge: {bits:.0f} bits, {100 * share:.2f} % on test.", ""]
    return []


def pipeline_table(results: dict[str, Any]) -> str:
    """Of one run of the pipeline."""
    metrics, latency = results["raw"]["metrics"], results["raw"]["timing"]["latency_ms"]
    ways = [way for way in WAYS if way in metrics]
    link = metrics["link"]
    figures = {key: value["value"] for key, value in results["figures"].items()}
    lines = [
        f"{results['dataset']['name']}, {results['raw']['params']['backbone']['name']}, {metrics['images']} test images; chosen: **{metrics['label']}**; "
        f"{link['rate_mbps']:g} Mbit/s, {link['rtt_ms']:g} ms round trip, device {metrics['slowdown']:g} times slower than one core of the machine below.",
        "",
        f"| per image | {' | '.join(heading(way, metrics, results['raw']['search']) for way in ways)} |",
        f"|---|{'---:|' * len(ways)}",
        "| top-1 accuracy, % | " + " | ".join(f"{100 * metrics[way]['accuracy']:.2f}" for way in ways) + " |",
        "| payload, bytes (mean) | "
        + " | ".join(f"{metrics[way]['payload_bits']['mean'] / 8:.1f}" if "payload_bits" in metrics[way] else "-" for way in ways)
        + " |",
        "| on the wire, bytes (mean) | "
        + " | ".join(f"{metrics[way]['wire_bytes']['mean']:.1f}" if "wire_bytes" in metrics[way] else "-" for way in ways)
        + " |",
    ]
    for part in ("device_ms", "encode_ms", "link_ms", "decode_ms", "edge_ms", "total_ms"):
        lines.append(f"| {part.removesuffix('_ms')}, ms (median) | " + " | ".join(f"{latency[way][part]['median']:.2f}" for way in ways) + " |")
    lines.append("| predicted total, ms | " + " | ".join(f"{metrics[way]['predicted_ms']['total_ms']:.2f}" for way in ways) + " |")
    machine = results["machine"]
    profiled = results["raw"]["profiled_on"]
    predicted = "" if profiled == machine["cpu"] else f" Predicted times are for {profiled}, which the profile was measured on."
    took = "an unmeasured time" if figures["repro_s"] is None else f"{figures['repro_s']:.0f} s"
    lines += [
        "",
        f"A first `dvc repro` took {took}, a second one {figures['noop_repro_s']:.1f} s, on {machine['cores']} cores of {machine['cpu']} "
        f"(commit {results['commit'][:8]}, {results['date']}, seed {', '.join(map(str, results['seeds']))}).{predicted}",
    ]
    return "\n".join(lines)


def _trial(row: dict[str, str]) -> Trial:
    """A row of trials.csv; what was not measured yet when it was written is NaN."""
    candidate = {
        field.name: row[field.name] or None if field.name in WORDS else json.loads(row[field.name] or "null")
        for field in fields(Candidate)
        if field.name in row
    }
    measured = {field.name: float(row.get(field.name, "nan")) for field in fields(Measurement)} if row["accuracy"] else None
    return Trial(
        int(row["number"]),
        Candidate.from_dict(candidate),
        Measurement(**measured) if measured else None,  # type: ignore[arg-type]
        int(row["duplicate_of"]) if row["duplicate_of"] else None,
    )


def pictures(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """File name -> figure."""
    if name == "pruned-half":
        return {}
    if name == "search":
        return search_pictures(results)
    return three_step_pictures(results) if name == "three_step" else pipeline_pictures(name, results)


def search_pictures(results: dict[str, Any]) -> dict[str, Any]:
    raw, found = results["raw"], dict[str, Any]()
    for place, runs in raw.get("fronts", {}).items():
        found |= {f"search-fronts-{place}.png": all_fronts(runs, place), f"search-hypervolume-{place}.png": progress(runs, place)}
    for part, draw in (("predictor", predicted), ("evaluator", ranked)):
        if part in raw:
            found[f"search-{part}.png"] = draw(raw[part])
    return found


def three_step_pictures(results: dict[str, Any]) -> dict[str, Any]:
    raw = results["raw"]
    found = {f"three_step-fronts{end}.png": fronts(raw, backbone, CUTS[backbone]) for backbone, end in (("resnet20", ""), ("resnet56", "-resnet56"))}
    found["three_step-macs.png"] = against_macs(raw)
    if any(row["point"].get("codec", {}).get("kind", "").startswith("jscc") for row in raw["points"].values()):
        found["three_step-noise.png"] = over_noise(raw)
    if "end_to_end" in raw:
        found["three_step-latency.png"] = over_links(raw["end_to_end"])
    return found


def pipeline_pictures(name: str, results: dict[str, Any]) -> dict[str, Any]:
    raw = results["raw"]
    metrics, measured = raw["metrics"], raw["timing"]["latency_ms"]
    ways = [way for way in WAYS if way in measured]
    title = f"{results['dataset']['name']}, {raw['params']['backbone']['name']}"
    medians = {way: {part: spread["median"] for part, spread in measured[way].items()} for way in ways}
    rates = [row["rate_mbps"] for row in raw["latency_vs_rate"]]
    totals = {way: [row[way] for row in raw["latency_vs_rate"]] for way in ways}
    found = {trial.number: trial for trial in map(_trial, raw["trials"])}
    marked = [found[raw["search"][way]["number"]] for way in ("chosen", "device_only", "edge_only")]
    limits = Limits(raw["search"]["floor"], raw["params"]["devices"]["camera"]["memory_mb"])
    return {
        f"{name}-latency.png": latency_breakdown(medians, f"{title}: measured medians"),
        f"{name}-rate.png": latency_against_rate(rates, totals, metrics["link"]["rate_mbps"], f"{title}: predicted, {metrics['label']}"),
        f"{name}-search.png": pareto_figure(list(found.values()), limits, marked[0], marked[1:], title),
    }


def readme(text: str) -> str:
    """`text` with every block between markers made afresh."""
    for block, name in BLOCKS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        images = " ".join(
            f"![{file.removeprefix(f'{name}-').removesuffix('.png')}]({'../' * (name in IN_DOCS)}results/{file})" for file in pictures(name, results)
        )
        body = "\n\n".join(part for part in (table(name, results), images) if part)
        text = re.sub(rf"(<!-- results:{block} -->\n).*?(<!-- /results -->)", lambda found: f"{found[1]}{body}\n{found[2]}", text, flags=re.S)  # noqa: B023
    return text


if __name__ == "__main__":
    for target in TARGETS:
        atomic_write_text(ROOT / target, readme((ROOT / target).read_text()))
    for name in BLOCKS.values():
        path = RESULTS / f"{name}.json"
        if path.exists():
            for file, picture in pictures(name, json.loads(path.read_text())).items():
                with atomic_path(RESULTS / file) as temporary:
                    picture.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
            track(name)
