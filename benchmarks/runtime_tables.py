"""The tables of results/runtime.json: what the runtime adds to the networks, and what it has withstood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]

CODERS = {"c": "ours", "python": "ours, without a compiler", "zlib": "zlib", "zstd": "zstd", "raw": "packed bits"}
TRANSPORTS = {"tcp": "TCP", "tcp_tls": "TCP, TLS", "tcp_compact": "TCP, compact", "grpc": "gRPC"}


def runtime_tables(results: Mapping[str, Any]) -> str:
    """All of them; what is not run yet is a dash."""
    figures, machine = results["figures"], results["machine"]
    end = f"Device on one core, edge on the other of {machine['cores']} cores of {machine['cpu']} (commit {results['commit'][:8]}, {results['date']})."
    return "\n\n".join([transports_table(figures), coders_table(figures), summary(figures), end])


def _cell(figures: Figures, key: str, form: str, scale: float = 1.0) -> str:
    value = figures.get(key, {}).get("value")
    return "-" if value is None else f"{scale * value:{form}}"


def transports_table(figures: Figures) -> str:
    def row(name: str) -> str:
        keys = (("overhead_ms", ".2f"), ("floor_ms", ".2f"), ("wire_bytes_per_image", ".0f"))
        return f"| {TRANSPORTS[name]} | {' | '.join(_cell(figures, f'{key}.{name}', form) for key, form in keys)} |"

    rows = [row(name) for name in TRANSPORTS if any(figures.get(f"{key}.{name}") for key in ("overhead_ms", "wire_bytes_per_image"))]
    return "\n".join(
        [
            "| transport | added to the two networks, ms | a bare echo of the same bytes, ms | bytes on the interface, both ways |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            "One image at a time, 4,096 symbols of 4 bits, from an array of pixels to a record on loopback; medians.",
        ]
    )


def coders_table(figures: Figures) -> str:
    cells = (
        f"| {called} | {_cell(figures, f'coder_ms_4096.{name}', '.3f')} | {_cell(figures, f'coder_bytes_4096.{name}', '.0f')} |"
        for name, called in CODERS.items()
    )
    return "\n".join(["| coder | encode and decode, ms | bytes |", "|---|---:|---:|", *cells])


def summary(figures: Figures) -> str:
    """The rest, in sentences."""

    def said(key: str, form: str, scale: float = 1.0) -> str:
        return _cell(figures, key, form, scale)

    return "\n".join(
        [
            f"* With batches the edge sustains {said('throughput_ratio', '.0f', 100)} % of what ONNX Runtime alone does at its best batch size "
            f"(ResNet-18; of ResNet-20 {said('throughput_ratio_resnet20', '.0f', 100)} %); at half of that load 99 of 100 answers come within "
            f"{said('p99_ms_half_load', '.1f')} ms.",
            f"* Predicted latency is off by {said('predicted_error_median', '.1f', 100)} % (median of five candidates, four rates, two devices).",
            f"* {said('soak_requests', ',.0f')} images in half an hour, the link cut 20 times and the server killed 5 times: {said('soak_lost', '.0f')} lost, "
            f"{said('soak_doubled', '.0f')} answered twice; outside of outages {said('soak_split_share', '.1f', 100)} % split, again "
            f"{said('soak_recovery_s_max', '.1f')} s after an outage at the latest; memory grew by {said('soak_memory_growth', '.1f', 100)} %.",
            f"* {said('fuzz_inputs', ',.0f')} hostile frames, streams and bundles: {said('fuzz_failures', '.0f')} crashes, hangs or wrong answers.",
            f"* `coinfer device` answers first after {said('first_prediction_s', '.2f')} s, and takes {said('device_rss_mb', '.0f')} MB (ResNet-20).",
        ]
    )
