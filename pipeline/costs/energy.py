"""Energy the device spends on one image (METHODS 4): computing, sending, waiting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ProfileError


@dataclass(frozen=True)
class PowerModel:
    """What the whole device draws while it computes, sends and waits, in W.

    Raises:
        ProfileError: a power that is negative or not finite.
    """

    cpu_w: float
    tx_w: float
    idle_w: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ProfileError(f"power {name} is {value}; give a number of watts, 0 or more.")


# Whole boards at the supply, in W. Published: idle and all four cores busy, and where from. [ref], ours: one busy core is idle plus a quarter of the
# difference, and sending over Wi-Fi is idle plus 0.7 W, around which published figures vary widely. docs/own-device.md has the table.
# Raspberry Pi 4 Model B: J. Geerling, Raspberry Pi Dramble, "Power Consumption Benchmarks" (pidramble.com, 540 mA and 1280 mA at 5 V);
# chipwired.com/raspberry-pi-power-use found 2.2-3.0 W and 5.1-6.3 W with three meters.
# Jetson Nano, 10 W mode, GPU asleep: S. Vayrette, saltylab-firmware, "Jetson Nano Power Budget Analysis" (gitea.vayrette.com: module idle 1.9 W, its four
# cores 1.0 W of that and 3.5 W under load), within the budgets of NVIDIA's "Power Management for Jetson Nano" (docs.nvidia.com). No network card included.
WIFI_W = 0.7
BOARDS: Mapping[str, tuple[float, float]] = {"raspberry-pi-4": (2.7, 6.4), "jetson-nano": (1.9, 1.9 - 1.0 + 3.5)}


def board(name: str) -> PowerModel:
    """The power of one of `BOARDS`, computing on one core.

    Raises:
        ProfileError: an unknown board.
    """
    if name not in BOARDS:
        raise ProfileError(f"board {name} is unknown; choose one of {', '.join(BOARDS)}, or give watts of your own.")
    idle_w, busy_w = BOARDS[name]
    return PowerModel(cpu_w=idle_w + (busy_w - idle_w) / 4, tx_w=idle_w + WIFI_W, idle_w=idle_w)


def energy_mj(parts: Mapping[str, float], power: PowerModel, tx_ms: float) -> float:
    """P_cpu * computing + P_tx * sending + P_idle * waiting, in mJ (W times ms).

    `parts` are those of `latency.predict` or measured alike. `device_ms` and `encode_ms` are computing; `tx_ms`, the uplink's share of `link_ms`
    (`link.transmit_ms(wire_bytes)`, 0 for device-only), is sending; all else up to `total_ms` is waiting.

    Raises:
        ProfileError: more sending than `link_ms` holds.
    """
    if not 0 <= tx_ms <= parts["link_ms"] * (1 + 1e-9):
        raise ProfileError(f"sending for {tx_ms} ms does not fit in the link's {parts['link_ms']} ms; pass link.transmit_ms(wire_bytes).")
    computing_ms = parts["device_ms"] + parts["encode_ms"]
    waiting_ms = parts["total_ms"] - computing_ms - tx_ms
    return power.cpu_w * computing_ms + power.tx_w * tx_ms + power.idle_w * waiting_ms
