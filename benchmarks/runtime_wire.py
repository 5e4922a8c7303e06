"""Bytes that an image takes on the network interface, each way; `measure` asks an edge in a network namespace of its own, where nobody else sends anything.

The namespace has a loopback interface with Ethernet's 1,500 bytes a packet. A packet socket sees each packet with its TCP/IP headers, and by the port which
way it goes; the interface's own counter, of both ways together, says whether any was missed.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import ROOT, figure
from benchmarks.runtime_coder import images
from pipeline.costs.link import wire_bytes
from pipeline.runtime.bundle import Bundle

IMAGES, WARM_UP = 300, 20
PACED, PACE_S = 0.1, 0.1  # of so many images a share is sent with pauses
SETTLE_S = 0.3  # after which no acknowledgement is on its way
ETH_P_IP = 0x0800
HEADER = struct.Struct(">xxH5xB10x")  # of IPv4: length, protocol
RAISE = 'ip link set lo mtu 1500 up && exec "$@"'


class Wire:
    """Counts TCP/IP packets of the loopback interface to and from a port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
        self._socket.bind(("lo", ETH_P_IP))
        self._socket.setblocking(False)
        self._begun, self._seen = _interface_bytes(), 0

    def since(self) -> dict[str, int]:
        """Bytes with TCP/IP headers and packets, "up" to the port and "down" from it, since this was asked last.

        Raises:
            RuntimeError: the interface carried something else.
        """
        found = {"up": 0, "down": 0, "up_packets": 0, "down_packets": 0}
        while (packet := self._next()) is not None:
            length, protocol = HEADER.unpack_from(packet)
            start = 4 * (packet[0] & 15)
            ports = struct.unpack_from(">HH", packet, start)
            if protocol != socket.IPPROTO_TCP or self._port not in ports:
                raise RuntimeError("somebody else sends over this interface; nothing can be counted on it")
            way = "up" if ports[1] == self._port else "down"
            found[way] += length
            found[f"{way}_packets"] += 1
        self._seen += found["up"] + found["down"]
        return found

    def check(self) -> None:
        """At a moment when nothing is on its way.

        Raises:
            RuntimeError: packets were missed.
        """
        counted = _interface_bytes() - self._begun
        if counted != self._seen:
            raise RuntimeError(f"{self._seen} bytes were seen where the interface counted {counted}; packets were missed")

    def _next(self) -> bytes | None:
        try:
            while True:
                packet, (_, _, kind, *_) = self._socket.recvfrom(1 << 16)
                if kind != socket.PACKET_OUTGOING:  # else it is seen twice
                    return packet
        except BlockingIOError:
            return None

    def close(self) -> None:
        self._socket.close()


def _interface_bytes() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def measure(bundle: Path, count: int = IMAGES) -> dict[str, Any]:
    """Ask an edge in a new network namespace, which takes root, for `count` images one after another, and a tenth as many with a pause between.

    Returns {way: {"images", "bytes": {"up", "down", "up_packets", "down_packets"} an image, "predicted_up": what METHODS' formula says of the frames; and the
    same of those with a pause as "paced_images", "paced", "predicted_up_paced"}} for tcp, tcp_compact and grpc.

    Raises:
        RuntimeError: there can be no namespace here, with the reason.
    """
    command = ["unshare", "--net", "sh", "-c", RAISE, "sh", sys.executable, __file__, str(bundle), str(count), str(max(1, round(count * PACED)))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"bytes on an interface could not be counted: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


def _measure(path: Path, count: int, paced: int) -> dict[str, Any]:
    from benchmarks.runtime_overhead import EDGE_OPTIONS, HOST, asked, program

    bundle = Bundle.load(path)
    pixels = images(bundle)
    found = {}
    edge = ("-m", "pipeline.cli", "edge", "--bundle", path, *EDGE_OPTIONS, "--grpc-port", "0")
    with program(*edge, ports=2, core=min(os.sched_getaffinity(0))) as (grpc_port, tcp_port):
        for name, port, address in (("tcp", tcp_port, HOST), ("tcp_compact", tcp_port, HOST), ("grpc", grpc_port, f"grpc://{HOST}")):
            wire = Wire(port)
            with asked(f"{address}:{port}", bundle, compact=name == "tcp_compact") as ask:
                for turn in range(WARM_UP):
                    ask(pixels[turn % len(pixels)])
                found[name] = {"images": count, "paced_images": paced}
                for key, times, pause_s in (("bytes", count, 0.0), ("paced", paced, PACE_S)):
                    time.sleep(SETTLE_S)
                    wire.since()
                    sizes, carried = [], dict.fromkeys(("up", "down", "up_packets", "down_packets"), 0)
                    for turn in range(times):
                        sizes.append(ask(pixels[turn % len(pixels)])["frame_bytes"])
                        time.sleep(pause_s)
                        _add(carried, wire.since())
                    time.sleep(SETTLE_S)
                    _add(carried, wire.since())
                    wire.check()
                    found[name][key] = {way: round(total / times, 3) for way, total in carried.items()}
                    found[name]["predicted_up" if key == "bytes" else "predicted_up_paced"] = round(float(np.mean([wire_bytes(size) for size in sizes])), 3)
            wire.close()
            time.sleep(SETTLE_S)
    return found


def _add(carried: dict[str, int], more: Mapping[str, int]) -> None:
    for way in carried:
        carried[way] += more[way]


KEYS = {"up": "wire_bytes_per_image", "down": "wire_bytes_down_per_image"}
SAID = {"tcp": "over TCP", "tcp_compact": "over TCP in the compact profile", "grpc": "over gRPC"}


def figures(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`wire_bytes_per_image.*`, what the device sends; `wire_bytes_down_per_image.*`, what the edge sends."""
    if "why" in raw:
        return {f"{key}.{name}": figure(None, "bytes", raw["why"]) for key in KEYS.values() for name in SAID}
    found = {}
    for name, row in raw.items():
        for way, key in KEYS.items():
            sender = "device" if way == "up" else "edge"
            how = (
                f"mean of what the {sender} sends {SAID[name]} for one image with TCP/IP headers and acknowledgements, without those of Ethernet, as counted "
                f"on the interface, image after image; {row['paced'][way]:.1f} with {PACE_S} s between them"
            )
            how += f"; frame_bytes + 52*ceil(frame_bytes/1448) says {row['predicted_up']:.1f}" if way == "up" else ""
            found[f"{key}.{name}"] = figure(row["bytes"][way], "bytes", how, n=row["images"])
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
