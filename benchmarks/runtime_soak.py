"""Does the runtime hold? A device that never stops, a link that is cut and a server that is killed, all as users run them, with keys.

`python benchmarks/runtime_soak.py --minutes 30 --requests 100000 --out FILE` writes what `measure` gives.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import ROOT, figure
from benchmarks.runtime_start import pictures, untrained_bundle
from benchmarks.soak_account import DRAIN, KILL, RESET, SILENT, WARM_UP, Account, Disruption, growth, plan
from pipeline.costs.link import Link
from pipeline.files import atomic_write_json
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.guard import device_keys
from pipeline.runtime.records import classify
from pipeline.runtime.relay import Relay, Weather
from pipeline.runtime.transport import LoopbackTransport

COINFER = (sys.executable, "-m", "pipeline.cli")
LINK = Link(rate_mbps=20, rtt_ms=2)
PICTURES = 1000
DEADLINE_MS = 1000.0
HOST = "127.0.0.1"
SAMPLES = 900  # of memory
WARM_UP_SAMPLES = round(WARM_UP * SAMPLES)
LEAST_SAMPLES = 2 * WARM_UP_SAMPLES  # of a life of the server that says something about its memory
SILENCE_S = 60.0  # without a record, after which the device is given up
PROGRESS_S = 60.0


def measure(minutes: float = 30, requests: int = 100_000, cuts: int = 20, kills: int = 5, seed: int = 0) -> dict[str, Any]:
    """`soak` of an untrained ResNet-20 and `PICTURES` JPEG files."""
    with tempfile.TemporaryDirectory() as folder:
        return soak(untrained_bundle(Path(folder) / "bundle"), pictures(PICTURES), 60 * minutes, requests, cuts, kills, seed)


def soak(bundle: Bundle, files: list[bytes], seconds: float, requests: int, cuts: int, kills: int, seed: int) -> dict[str, Any]:
    """Send `files` over and over, `requests` evenly over `seconds`, to one `coinfer device`, and disturb its link and its server as `plan` says.

    Returns {"seconds" (in all, from the first record on), "requests", "cuts", "kills", "seed", "deadline_ms", "link", "pictures": {"files", "distinct":
    {path: answers that are no other picture's}}, "records" (see `Account.exactly_once`), "split" (answers), "shares" (see `Account.shares`), "by_second",
    "outages": [{"kind", "begin_s", "end_s", "recovery_s"}], "lives" of the server: [{"end", "end_s", "drain_s" (from the signal to its end), "seen_s",
    "executions" (at that moment), "split_after" (answers asked for later), "rss_kib"}], "memory": {"every_s", "device_kib"}, "total_ms": {path: {quantile:
    ms}}, "late" (answers after the deadline), "why" (what the device said of the edge: answers), "wrong" (some records), "device_status"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*COINFER, "keys", f"{folder}/keys", "--edge", HOST, "--device", "soak"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        expected = _expected(bundle, files, Path(folder) / "files")
        account = Account(expected)
        raw = asyncio.run(_Soak(bundle, files, seconds, requests, Path(folder) / "keys", account).run(plan(seconds, cuts, kills, seed)))
    distinct = {path: len({(each["label"], each["probability"]) for each in records}) for path, records in expected.items()}
    settings = {"requests": requests, "cuts": cuts, "kills": kills, "seed": seed, "deadline_ms": DEADLINE_MS, "link": vars(LINK) | {}}
    return {**settings, "pictures": {"files": len(files), "distinct": distinct}, **raw}


def _expected(bundle: Bundle, files: list[bytes], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The record of each file, by the path taken."""
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"{number:06}.jpg").write_bytes(file)
    ways = {"split": LoopbackTransport(EdgeHalf(bundle)), "device-only": None}
    found = {path: list(classify(bundle, edge, str(folder), deadline_ms=60 * DEADLINE_MS)) for path, edge in ways.items()}
    assert all(record["path"] == path for path, records in found.items() for record in records)
    return found


class _Soak:
    def __init__(self, bundle: Bundle, files: list[bytes], seconds: float, requests: int, keys: Path, account: Account) -> None:
        self._bundle, self._files, self._seconds, self._requests, self._keys, self._account = bundle, files, seconds, requests, keys, account
        self._outages: list[dict[str, Any]] = []
        self._lives: list[dict[str, Any]] = []
        self._device_kib: list[int] = []
        self._port = self._metrics_port = 0

    async def run(self, disruptions: list[Disruption]) -> dict[str, Any]:
        async with self._serving():
            with _relayed((HOST, self._port)) as (self._link_pid, port):
                command = (*COINFER, "device", "--bundle", self._bundle.path, "--source", "stdin", "--edge", f"{HOST}:{port}")
                options = ("--keys", self._keys / "soak", "--deadline", str(DEADLINE_MS))
                self._device = await asyncio.create_subprocess_exec(*command, *options, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                try:
                    await self._begin()
                    await self._until_answered(disruptions)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        self._device.kill()
                status = await self._device.wait()
            if "end" not in self._lives[-1]:
                await self._end_life("end")
        return self._found(status)

    async def _begin(self) -> None:
        """Time counts from the first record on, whatever the device needs to start."""
        assert self._device.stdin is not None
        assert self._device.stdout is not None
        self._device.stdin.write(self._files[0])
        first = await asyncio.wait_for(self._device.stdout.readline(), SILENCE_S)
        self._begin_s = time.monotonic()
        self._account.ask(0.0)
        self._account.hear(first, 0.0)

    async def _until_answered(self, disruptions: list[Disruption]) -> None:
        async with asyncio.TaskGroup() as group:
            disturbing = group.create_task(self._disturb(disruptions))
            others = [group.create_task(each) for each in (self._feed(disturbing), self._watch(), self._tell())]
            await self._hear()
            for task in (disturbing, *others):
                task.cancel()

    def _now_s(self) -> float:
        return time.monotonic() - self._begin_s

    async def _feed(self, disturbing: asyncio.Task[None]) -> None:
        assert self._device.stdin is not None
        with contextlib.suppress(ConnectionError):  # of a device that has ended, which the records tell
            for number in range(1, self._requests):
                if (left_s := number * self._seconds / self._requests - self._now_s()) > 0:
                    await asyncio.sleep(left_s)
                self._account.ask(self._now_s())
                self._device.stdin.write(self._files[number % len(self._files)])
                await self._device.stdin.drain()
            await asyncio.wait([disturbing])
            self._device.stdin.close()

    async def _hear(self) -> None:
        assert self._device.stdout is not None
        with contextlib.suppress(TimeoutError):
            while line := await asyncio.wait_for(self._device.stdout.readline(), SILENCE_S):
                self._account.hear(line, self._now_s())
            await asyncio.wait_for(self._device.wait(), SILENCE_S)

    async def _disturb(self, disruptions: list[Disruption]) -> None:
        for each in disruptions:
            await asyncio.sleep(max(0.0, each.at_s - self._now_s()))
            outage: dict[str, Any] = {"kind": each.kind, "begin_s": self._now_s(), "end_s": float("inf")}
            if each.kind in (KILL, DRAIN):
                await self._end_life(each.kind)
                outage["begin_s"] = self._lives[-1]["end_s"]
                self._outages.append(outage)
                await asyncio.sleep(each.for_s)
                await self._start()
            else:
                self._outages.append(outage)
                begin, end = {RESET: (signal.SIGUSR1, signal.SIGUSR2), SILENT: (signal.SIGSTOP, signal.SIGCONT)}[each.kind]
                os.kill(self._link_pid, begin)
                await asyncio.sleep(each.for_s)
                os.kill(self._link_pid, end)
            outage["end_s"] = self._now_s()

    async def _watch(self) -> None:
        while True:
            for pid, curve in ((self._device.pid, self._device_kib), (self._server_pid, self._lives[-1]["rss_kib"])):
                if (rss_kib := _rss_kib(pid)) is not None:
                    curve.append(rss_kib)
            await asyncio.sleep(self._seconds / SAMPLES)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            said = ", ".join(f"{count} {what}" for what, count in self._account.exactly_once().items() if what != "lost")
            print(f"soak: {self._now_s() / 60:.1f} min, {said}; {len(self._outages)} outages", file=sys.stderr, flush=True)

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        await self._start()
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._server.kill()
            await self._server.wait()

    async def _start(self) -> None:
        """Begin a life of the server, where the one before has listened."""
        command = (*COINFER, "edge", "--bundle", self._bundle.path, "--port", str(self._port), "--keys", self._keys / "edge", "--metrics", f"{HOST}:0")
        self._server = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
        assert self._server.stdout is not None
        ports = [int((await self._server.stdout.readline()).split()[-1]) for _ in range(2)]
        self._metrics_port, self._port = ports
        self._server_pid = self._server.pid
        self._lives.append({"rss_kib": []})

    async def _end_life(self, kind: str) -> None:
        life = self._lives[-1]
        life["executions"] = await asyncio.to_thread(_executions, self._metrics_port, self._keys / "soak")
        seen_s = self._now_s()
        self._server.send_signal(signal.SIGKILL if kind == KILL else signal.SIGTERM)
        end_s = self._now_s()
        life |= {"end": kind, "end_s": end_s, "seen_s": seen_s}
        status = await asyncio.wait_for(self._server.wait(), SILENCE_S)
        assert status == (-signal.SIGKILL if kind == KILL else 0), f"the server ended with {status}"
        life["drain_s"] = round(self._now_s() - end_s, 3)

    def _found(self, status: int) -> dict[str, Any]:
        account, now_s = self._account, self._now_s()
        for outage in self._outages:
            outage["end_s"] = min(outage["end_s"], now_s)
        edges = [(each["begin_s"], each["end_s"]) for each in self._outages]
        for outage, recovery_s in zip(self._outages, account.recoveries_s(edges), strict=True):
            outage |= {"begin_s": round(outage["begin_s"], 3), "end_s": round(outage["end_s"], 3)}
            outage["recovery_s"] = None if recovery_s is None else round(recovery_s, 3)
        spans = account.spans()
        for life, outage in zip(self._lives, [*(each for each in self._outages if each["kind"] in (KILL, DRAIN)), None], strict=False):
            until_s = outage["end_s"] if outage else float("inf")
            life["split_after"] = sum(is_split and life["seen_s"] <= begin_s < until_s for (begin_s, _), is_split in zip(spans, account.is_split, strict=False))
            life |= {"seen_s": round(life["seen_s"], 3), "end_s": round(life["end_s"], 3)}
        return {
            "seconds": round(now_s, 1),
            "records": account.exactly_once(),
            "split": sum(account.is_split),
            "shares": account.shares(edges),
            "outages": self._outages,
            "lives": self._lives,
            "memory": {"every_s": self._seconds / SAMPLES, "device_kib": self._device_kib},
            "total_ms": {
                path: _quantiles([ms for ms, is_split in zip(account.total_ms, account.is_split, strict=True) if is_split == (path == "split")])
                for path in ("split", "device-only")
            },
            "late": sum(ms > DEADLINE_MS for ms in account.total_ms),
            "why": dict(account.why),
            "wrong": account.wrong[:20],
            "by_second": account.by_second(),
            "device_status": status,
        }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)) if ordered}


def _rss_kib(pid: int) -> int | None:
    """Resident memory; None of a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), None)


def _executions(port: int, keys: Path) -> int:
    """Frames that a server has run, as its metrics say."""
    held = device_keys(keys, HOST)
    context: ssl.SSLContext | None = held.context if held else None
    with urllib.request.urlopen(f"https://{HOST}:{port}/metrics", context=context, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return sum(int(sample.value) for family in families for sample in family.samples if sample.name == "coinfer_frames_total")


@contextlib.contextmanager
def _relayed(to: tuple[str, int]) -> Iterator[tuple[int, int]]:
    """A process that relays to `to` over `LINK`, and its port. SIGUSR1 cuts the link, SIGUSR2 mends it; while it is stopped nothing passes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_relay, args=(to, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process.pid or 0, ours.recv()
    finally:
        process.kill()
        process.join()
        ours.close()


def _relay(to: tuple[str, int], ready: Connection) -> None:
    async def run() -> None:
        relay = Relay(LINK, Weather(), to)
        for number, act in ((signal.SIGUSR1, relay.cut), (signal.SIGUSR2, relay.mend)):
            asyncio.get_running_loop().add_signal_handler(number, act)
        await relay.serve(HOST, 0, ready.send)

    asyncio.run(run())


def figures(raw: dict[str, Any]) -> dict[str, Any]:
    """The figures `soak_*`, from what `measure` gives."""
    records, outages, lives, shares = raw["records"], raw["outages"], raw["lives"], raw["shares"]
    asked = records["asked"]
    kinds = [each["kind"] for each in outages]
    cuts, kills = sum(kind in (RESET, SILENT) for kind in kinds), kinds.count(KILL)
    load = (
        f"`coinfer device --source stdin` and `coinfer edge` with keys through a relay of {raw['link']['rate_mbps']:g} Mbit/s and {raw['link']['rtt_ms']:g} ms"
    )
    load += f", {raw['seconds'] / 60:.1f} minutes, deadline {raw['deadline_ms']:g} ms"
    once = f"by label and probability, which of {raw['pictures']['files']} pictures an answer is of; {records['wrong']} answers are of none"
    found = {
        "soak_requests": figure(asked, "images", load),
        "soak_lost": figure(records["lost"], "images", f"never answered, {once}", n=asked),
        "soak_doubled": figure(records["doubled"], "answers", f"answers beyond the first of an image, {once}", n=asked),
        "soak_cuts": figure(cuts, "cuts", f"{kinds.count(RESET)} reset all connections and refuse new ones, in {kinds.count(SILENT)} nothing passes"),
        "soak_kills": figure(kills, "kills", f"SIGKILL of the server, which is started again; {kinds.count(DRAIN)} SIGTERM, which it ended well, beside"),
    }
    for key, name, how in (
        ("outside", "soak_split_share", "of answers outside outages (cut to mended, killed to listening again), the time to recover from them included"),
        ("settled", "soak_split_share_settled", "of answers from each recovery to the next outage"),
    ):
        counted = shares[key]
        value = counted["split"] / counted["answered"] if counted["answered"] else None
        found[name] = figure(value, "share", f"answered by splitting, {how}", n=counted["answered"])
    recoveries = [each["recovery_s"] for each in outages]
    known = [each for each in recoveries if each is not None]
    how = "from the end of an outage to the first answer by splitting, the longest"
    if len(known) < len(recoveries) or not known:
        found["soak_recovery_s_max"] = figure(
            None, "s", f"{len(recoveries) - len(known)} of {len(recoveries)} outages were not followed by an answer by splitting"
        )
    else:
        found["soak_recovery_s_max"] = figure(max(known), "s", how, n=len(known), spread=(min(known), max(known)))
    executions = sum(life["executions"] + life["split_after"] for life in lives)
    how = f"frames the server ran, from /metrics before each of its {len(lives)} ends, and answers by splitting after that; at most 2 an end are missing"
    found["soak_edge_executions"] = figure(executions, "frames", how, n=len(lives))
    found["soak_edge_unused"] = figure(executions - raw["split"], "frames", f"{how}; minus answers by splitting", n=len(lives))
    return found | _memory(raw)


def _memory(raw: dict[str, Any]) -> dict[str, Any]:
    warm_up_s = WARM_UP_SAMPLES * raw["memory"]["every_s"]
    how = f"resident memory, median of the last tenth of the samples over that of as many after the first {warm_up_s:.0f} s, minus 1"
    device = [growth(raw["memory"]["device_kib"], WARM_UP_SAMPLES)]
    server = [growth(life["rss_kib"], WARM_UP_SAMPLES) for life in raw["lives"] if len(life["rss_kib"]) >= LEAST_SAMPLES]
    lives = f"{len(server)} lives of the server of at least {LEAST_SAMPLES * raw['memory']['every_s']:.0f} s"
    found = {"soak_memory_growth_device": figure(device[0], "share", f"{how}; the device")}
    if not server:
        return found | {name: figure(None, "share", f"there were {lives}") for name in ("soak_memory_growth_server", "soak_memory_growth")}
    found["soak_memory_growth_server"] = figure(max(server), "share", f"{how}; the largest of {lives}", n=len(server), spread=(min(server), max(server)))
    both = device + server
    found["soak_memory_growth"] = figure(max(both), "share", f"{how}; the largest of the device and {lives}", n=len(both), spread=(min(both), max(both)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raw = measure(arguments.minutes, arguments.requests, arguments.cuts, arguments.kills, arguments.seed)
    if arguments.out:
        atomic_write_json(arguments.out, raw)
    for name, row in figures(raw).items():
        value = row["value"]
        print(f"{name:28} {'none' if value is None else f'{value:.5g}'} {row['unit']} ({row['how']})")
