"""The command line: one command per stage, plus what users run around them. Nothing but parsing and progress."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import CoinferError, Interrupted, ParamsError
from pipeline.paths import PARAMS

if TYPE_CHECKING:
    from pipeline.runtime.bundle import Bundle

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Device-edge co-inference: find, train, export and run a split."
)
bundle_app = typer.Typer(no_args_is_help=True, help="Sign a bundle, or turn it into what other servers load.")
app.add_typer(bundle_app, name="bundle")
DeviceOption = Annotated[str | None, typer.Option("--device", help="a name under `devices` in params.yaml; the first one by default")]
KeysOption = Annotated[Path | None, typer.Option("--keys", help="folder that `coinfer keys` made; needed beyond loopback")]
SignedOption = Annotated[Path | None, typer.Option("--signed-by", metavar="PEM", help="public key; a bundle that is not signed with its other half is refused")]
BundleOption = Annotated[Path, typer.Option("--bundle", help="folder that `export` wrote")]

EDGE_EXTRA = {"cryptography", "google", "grpc", "prometheus_client"}

# What a stage's MLflow run shows of params.yaml, beside the device's own section.
SECTIONS = {
    "prepare": ("data",),
    "pretrain": ("run", "data", "backbone", "pretrain"),
    "profile": ("run", "data", "backbone", "search"),
    "supernet": ("run", "data", "backbone", "codec", "search", "supernet"),
    "search": ("run", "data", "backbone", "codec", "search", "objective"),
    "finetune": ("run", "data", "backbone", "pretrain", "codec", "finetune"),
    "export": ("run", "data", "backbone"),
    "evaluate": ("evaluate",),
}


def _stage(name: str, *, per_device: bool, device: str | None = None) -> None:
    from pipeline.params import load_params

    params = load_params()
    where: dict[str, str] = {}
    if per_device:
        where["device"] = device or next(iter(params.devices))
        params.device(where["device"])

    # Idle OpenMP threads otherwise spin, which makes a stage several times slower as soon as anything else wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from pipeline.tracking import stage_run

    torch.set_num_threads(params.run.threads)
    shown = params.model_dump(include=set(SECTIONS[name])) | {key: params.device(device).model_dump() for key, device in where.items()}
    with stage_run(name, where.get("device"), PARAMS) as tracker:
        tracker.log_params(shown)
        try:
            importlib.import_module(f"pipeline.stages.{name}").run(params=params, tracker=tracker, **where)
        except KeyboardInterrupt:  # before or after the long part, which says itself what it keeps
            raise Interrupted(f"{name} was interrupted; nothing half-written was kept, `dvc repro` goes on.") from None


@app.command()
def prepare() -> None:
    """Images -> uint8 tensors of train, validation, gate and test."""
    _stage("prepare", per_device=False)


@app.command()
def pretrain() -> None:
    """Train the backbone, or load and improve given weights."""
    _stage("pretrain", per_device=False)


@app.command()
def profile(
    device: DeviceOption = None,
    into: Annotated[Path | None, typer.Option("--into", help="measure a machine into this file, for example profiles/pi4.json, and do nothing else")] = None,
    on: Annotated[
        str | None, typer.Option("--on", metavar="HOST:PORT", help="with --into: the machine where `coinfer profile-agent` runs, not this one")
    ] = None,
) -> None:
    """List the cut points and write the profiles of device and edge; or measure a machine for the backbone in params.yaml."""
    if into is None:
        if on is not None:
            raise ParamsError("--on names a machine to measure; say with --into which profile to write.")
        _stage("profile", per_device=True, device=device)
        return
    if device is not None:
        raise ParamsError("--into measures a machine and --device writes the profiles of a device in params.yaml; give one of them.")
    from pipeline.costs.measure import measure_into
    from pipeline.costs.remote_bench import RemoteBench
    from pipeline.params import load_params

    try:
        if on is None:
            measure_into(load_params(), into)
            return
        with RemoteBench(on) as bench:
            measure_into(load_params(), into, bench)
    except KeyboardInterrupt:  # before or after the measuring, which says itself what it keeps
        raise Interrupted(f"profile was interrupted; {into} is as it was, run it again.") from None


@app.command()
def supernet(device: DeviceOption = None) -> None:
    """Train what the search's trials start from."""
    _stage("supernet", per_device=True, device=device)


@app.command()
def search(device: DeviceOption = None) -> None:
    """Search cut, pruning and codec; choose one candidate."""
    _stage("search", per_device=True, device=device)


@app.command()
def finetune(device: DeviceOption = None) -> None:
    """Prune for real, insert the codec, train with distillation."""
    _stage("finetune", per_device=True, device=device)


@app.command()
def export(device: DeviceOption = None) -> None:
    """Write the bundle: ONNX halves, coder tables, manifest."""
    _stage("export", per_device=True, device=device)


@app.command()
def evaluate(device: DeviceOption = None) -> None:
    """Measure the bundle on the test images, over a link."""
    _stage("evaluate", per_device=True, device=device)


@app.command()
def report(device: DeviceOption = None) -> None:
    """Print the chosen split beside device-only and edge-only."""
    from pipeline.params import load_params
    from pipeline.report import print_report

    params = load_params()
    for name in [device] if device else params.devices:
        params.device(name)
        print_report(name)


@app.command()
def params() -> None:
    """Print every parameter, its type, default and meaning as a Markdown table."""
    from pipeline.params import markdown

    print(markdown())


@app.command()
def edge(
    bundle: Annotated[Path, typer.Option("--bundle", help="folder that `export` wrote, or a folder of such folders, which may come and go")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one")] = 7070,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="of the Open Inference Protocol over gRPC, beside; left out: none")] = None,
    threads: Annotated[int, typer.Option(min=1, help="ONNX Runtime threads")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="frames that run together")] = 8,
    max_delay: Annotated[float, typer.Option(min=0, max=10_000, metavar="MS", help="that a frame waits for others; those that came meanwhile never wait")] = 0,
    max_waiting: Annotated[int, typer.Option(min=1, help="frames in the queue of a bundle; more are answered `busy` at once")] = 256,
    max_connections: Annotated[int, typer.Option(min=1, help="open at once; more are told so and closed")] = 1024,
    max_payload_bytes: Annotated[int, typer.Option(min=1, help="of one frame")] = 1 << 20,
    max_per_second: Annotated[float, typer.Option(min=1, help="frames of one device, on average; without keys, of one address")] = 1000,
    keys: KeysOption = None,
    signed_by: SignedOption = None,
    metrics: Annotated[str | None, typer.Option("--metrics", metavar="HOST:PORT", help="serve /metrics (Prometheus), /livez and /readyz there")] = None,
    log_mlflow: Annotated[bool, typer.Option("--log-mlflow", help="at the end log what was served as a run of MLflow (MLFLOW_TRACKING_URI)")] = False,
) -> None:
    """Serve the edge half of a bundle, or of all bundles in a folder as they come and go, over TCP and gRPC."""
    from pipeline.runtime.address import parse_address
    from pipeline.runtime.lane import Batching
    from pipeline.runtime.server import Front, Limits, serve

    limits = Limits(max_payload_bytes, max_connections, max_waiting, max_per_second)
    fronts: list[Front] = []
    if grpc_port is not None:
        from pipeline.runtime.grpc_front import GrpcFront

        fronts.append(GrpcFront(host, grpc_port))
    if metrics is not None:
        from pipeline.runtime.metrics import MetricsFront

        fronts.append(MetricsFront(*parse_address(metrics, "127.0.0.1:9070", least=0)))
    options: dict[str, Any] = {"keys": keys, "fronts": fronts}
    if signed_by is not None:
        from pipeline.runtime.signing import Signer

        options["check"] = Signer(signed_by).check
    run = partial(serve, bundle, host, port, threads=threads, batching=Batching(max_batch, max_delay), limits=limits, **options)
    if log_mlflow:
        from pipeline.serving import log_or_keep
        from pipeline.tracking import check_tracking

        check_tracking()
        log_or_keep(run())
    else:
        run()


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="made, or added to; whoever has its ca.key can make keys for this edge")],
    edge: Annotated[list[str] | None, typer.Option("--edge", metavar="HOST", help="name or address under which devices reach the edge")] = None,
    device: Annotated[list[str] | None, typer.Option("--device", metavar="NAME", help="a device that may ask the edge")] = None,
    days: Annotated[int, typer.Option(min=1, max=36500, help="after which the certificates end")] = 730,
) -> None:
    """Make the keys without which an edge listens on loopback only: one folder for the edge, one for each device."""
    from pipeline.runtime.keymaking import make_keys

    for written in make_keys(folder, edge or [], device or [], days):
        print(written)


@app.command("profile-agent")
def profile_agent(
    host: Annotated[str, typer.Option(help="address to listen on; whoever reaches it can run models here")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one")] = 7071,
) -> None:
    """Let `coinfer profile --on` measure this machine."""
    from pipeline.runtime.bench_server import serve_bench

    serve_bench(host, port)


@app.command()
def link(
    to: Annotated[str, typer.Option("--to", metavar="HOST:PORT", help="the server, for instance of `coinfer edge`")],
    rate: Annotated[float | None, typer.Option("--rate", metavar="MBPS", help="Mbit/s, each way")] = None,
    rtt: Annotated[float, typer.Option("--rtt", metavar="MS", help="round-trip propagation")] = 0,
    trace: Annotated[Path | None, typer.Option("--trace", help="instead of --rate: lines of seconds and Mbit/s, repeated at their end")] = None,
    jitter: Annotated[float, typer.Option("--jitter", metavar="MS", help="most that a segment comes late, uniformly; the order stays")] = 0,
    loss: Annotated[float, typer.Option("--loss", metavar="SHARE", help="of segments that are lost and sent again after a timeout")] = 0,
    stall: Annotated[str | None, typer.Option("--stall", metavar="EVERY:FOR", help="nothing passes in the last FOR of every EVERY seconds")] = None,
    cut: Annotated[str | None, typer.Option("--cut", metavar="EVERY:FOR", help="connections are reset then, new ones as soon as they are accepted")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of jitter and loss")] = 0,
    host: Annotated[str, typer.Option(help="address to listen on; beyond loopback with --anyone only")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one")] = 7072,
    anyone: Annotated[
        bool, typer.Option("--anyone", help="let other machines reach the server through the link, also one that listens on loopback only")
    ] = False,
) -> None:
    """Relay TCP connections over an emulated link; a device that is told this address reaches the edge as through a radio."""
    from pipeline.runtime.address import parse_address
    from pipeline.runtime.relay import Relay, link_and_weather, serve_link

    serve_link(Relay(*link_and_weather(rate, rtt, trace, jitter, loss, stall, cut), parse_address(to, "127.0.0.1:7070"), seed), host, port, anyone)


@app.command()
def device(
    bundle: BundleOption,
    source: Annotated[str, typer.Option("--source", help="an image, a folder, a video, a camera (/dev/video0), an URL (rtsp://...), or stdin: JPEG images")],
    edge: Annotated[str | None, typer.Option("--edge", metavar="[grpc://]HOST:PORT", help="left out: everything runs here")] = None,
    threads: Annotated[int, typer.Option(min=1, help="ONNX Runtime threads")] = 1,
    point: Annotated[int, typer.Option(min=0, help="operating point, 0 the most accurate; only a multi-rate bundle has several")] = 0,
    deadline: Annotated[float, typer.Option("--deadline", metavar="MS", help="an image that the edge has not answered by then is classified here")] = 1000,
    keys: KeysOption = None,
    name: Annotated[str | None, typer.Option("--name", help="of this device, told the edge; with keys, theirs")] = None,
    compact: Annotated[bool, typer.Option("--compact", help="6 bytes around a payload rather than 13, for the narrowest links")] = False,
    signed_by: SignedOption = None,
) -> None:
    """Run the device half on images; print one JSON line an image."""
    ignored = [option for option, value in {"--keys": keys, "--name": name, "--compact": compact or None}.items() if value is not None]
    if edge is None and ignored:
        raise ParamsError(f"{', '.join(ignored)} would change nothing, as no edge is asked; give --edge too, or leave that out.")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it as SIGTERM does, without a word: it leaves nothing half-written
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start threads that nothing here uses, a tenth of the time to the first record
    from pipeline.runtime.bundle import Bundle
    from pipeline.runtime.dial import dial
    from pipeline.runtime.records import classify

    opened = _checked(Bundle.load(bundle), signed_by)
    transport = dial(edge, keys, name, opened.bundle_id if compact else b"") if edge is not None else None
    for record in classify(opened, transport, source, threads=threads, point=point, deadline_ms=deadline):
        _put_line(json.dumps(record))


def _put_line(text: str) -> None:
    """Print at once; a reader that has gone ends the program without a word, as SIGPIPE ends others."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush of all would fail too, and say so
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise CoinferError(f"standard output cannot be written ({error.strerror}); make room there or send it elsewhere.") from None


@bundle_app.command("sign")
def bundle_sign(
    bundle: Annotated[Path, typer.Argument(help="folder that `export` wrote")],
    key: Annotated[Path, typer.Option("--key", metavar="PEM", help="private Ed25519 key, as openssl genpkey makes one")],
) -> None:
    """Vouch for a bundle, for devices and edges that are started with --signed-by."""
    from pipeline.runtime.bundle import Bundle
    from pipeline.runtime.signing import sign

    print(sign(Bundle.load(bundle), key))


@bundle_app.command("triton")
def bundle_triton(
    bundle: Annotated[Path, typer.Argument(help="folder that `export` wrote")],
    out: Annotated[Path, typer.Argument(help="a new folder: the model repository")],
    signed_by: SignedOption = None,
    max_batch: Annotated[int, typer.Option(min=1, help="frames that run together")] = 8,
    max_delay: Annotated[float, typer.Option(min=0, max=10_000, metavar="MS", help="that frames wait for others once decoded")] = 0,
) -> None:
    """Write the edge half of a bundle as a model repository of NVIDIA Triton; prints the name of the model to ask."""
    from pipeline.runtime.bundle import Bundle
    from pipeline.runtime.lane import Batching
    from pipeline.runtime.triton import write_repository

    print(write_repository(_checked(Bundle.load(bundle), signed_by), out, Batching(max_batch, max_delay)))


def _checked(bundle: Bundle, signed_by: Path | None) -> Bundle:
    if signed_by is not None:
        from pipeline.runtime.signing import Signer

        Signer(signed_by).check(bundle)
    return bundle


def main() -> None:
    """Run the command line; expected failures are one sentence on standard error."""
    # `python -m pipeline.cli` runs the copy in the current directory; `coinfer` must find a user's own backbone there too.
    if "" not in sys.path:
        sys.path.append("")  # last, or a stray numpy.py among the images would be run
    try:
        app(standalone_mode=True)
    except Interrupted as error:
        _fail(str(error), 130)
    except CoinferError as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        name, extra = ("edge", "edge") if str(error.name).partition(".")[0] in EDGE_EXTRA else ("training", "train")
        _fail(f"this command needs the package {error.name}, which is not installed; install the {name} extra: pip install 'coinfer[{extra}]'.", 1)


def _fail(message: str, code: int) -> Any:
    print(f"coinfer: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
