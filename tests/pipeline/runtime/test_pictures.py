"""Every kind of source gives its pictures in order; what is none, or ends before its time, is one sentence."""

import functools
import http.server
import io
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import CoinferError, DataError
from pipeline.runtime.pictures import jpegs, pictures

SHADES = (20, 90, 160, 230)


def jpeg(shade: int, **options) -> bytes:
    file = io.BytesIO()
    rng = np.random.default_rng(shade)
    Image.fromarray((np.full((40, 60, 3), shade) + rng.integers(-9, 9, (40, 60, 3))).clip(0, 255).astype(np.uint8)).save(file, "JPEG", **options)
    return file.getvalue()


class Trickle(io.RawIOBase):
    """What comes in small pieces, as through a pipe."""

    def __init__(self, data: bytes, piece: int) -> None:
        self.data, self.piece = data, piece

    def read(self, size: int = -1) -> bytes:
        some, self.data = self.data[: self.piece], self.data[self.piece :]
        return some


def with_thumbnail() -> bytes:
    """A JPEG that holds another in its EXIF segment, whose end is not its own."""
    inner = jpeg(7)
    payload = b"Exif\0\0" + inner
    return b"\xff\xd8\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg(90)[2:]


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_jpeg_images_one_after_another_are_told_apart(piece):
    images = [jpeg(20), jpeg(90, progressive=True), with_thumbnail(), jpeg(160, restart_marker_blocks=1), jpeg(230, comment=b"\xff\xd9")]
    assert list(jpegs(Trickle(b"".join(images), piece))) == images


def test_an_image_is_given_before_the_next_has_begun():
    stream = io.BytesIO(jpeg(20))
    assert next(jpegs(stream)) == jpeg(20)


@pytest.mark.parametrize(
    ("data", "good", "message"),
    [
        (b"hello", 0, "begins as image 0 on standard input is no JPEG"),
        (jpeg(20) + b"\n" + jpeg(90), 1, "begins as image 1"),
        (jpeg(20) + jpeg(90)[:-5], 1, "ends inside image 1; the 1 before"),
        (jpeg(20)[:-1], 0, "ends inside image 0"),
        (b"\xff\xd8\xff", 0, "ends inside image 0"),
        (b"\xff\xd8hello", 0, "image 0 on standard input is damaged"),
    ],
)
def test_what_is_no_jpeg_is_refused_and_what_came_before_it_is_not_lost(data, good, message):
    found = jpegs(io.BytesIO(data))
    assert len(list(itertools.islice(found, good))) == good
    with pytest.raises(DataError, match=message):
        next(found)


def test_an_image_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("pipeline.runtime.pictures.MOST_JPEG_BYTES", 10_000)
    with pytest.raises(DataError, match="has more than"):
        list(jpegs(io.BytesIO(jpeg(20)[:-2] + bytes(20_000))))


@given(st.binary(max_size=300))
def test_any_bytes_are_images_or_one_sentence(data):
    try:
        for image in jpegs(io.BytesIO(b"\xff\xd8" + data)):
            assert image in b"\xff\xd8" + data
    except DataError as error:
        assert "standard input" in str(error)  # noqa: PT017


def test_the_command_reads_standard_input(make_bundle):
    bundle = make_bundle("device-only")
    command = [sys.executable, "-m", "pipeline.cli", "device", "--bundle", str(bundle.path), "--source", "stdin"]
    run = subprocess.run(command, input=jpeg(20) + b"\xff\xd8\xff\xd9" + jpeg(90), capture_output=True, check=True)
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert [record["frame"] for record in records] == [0, 1, 2]
    assert "error" in records[1]
    assert {records[0]["label"], records[2]["label"]} <= set(bundle.classes)


def test_an_empty_standard_input_is_an_error(make_bundle):
    command = [sys.executable, "-m", "pipeline.cli", "device", "--bundle", str(make_bundle("device-only").path), "--source", "stdin"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1)
    assert "standard input holds no image" in run.stderr


def video(path: Path, seconds: float = 0.4, rate: int = 10) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(round(seconds * rate)):
            picture = np.full((48, 64, 3), SHADES[number % len(SHADES)], np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def shade(picture) -> int:
    return round(float(np.asarray(picture.convert("L")).mean()))


def test_a_video_gives_all_its_frames(tmp_path):
    shots = [(shot.name, shade(shot.picture)) for shot in pictures(str(video(tmp_path / "clip.mkv")))]
    assert [name for name, _ in shots] == [{"frame": number} for number in range(4)]
    assert [grey for _, grey in shots] == pytest.approx(SHADES, abs=3)


@pytest.fixture
def served(tmp_path):
    """URL of the folder's files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_of_a_stream_the_newest_picture_is_given_and_its_end_is_one_sentence(tmp_path):
    data = video(tmp_path / "clip.mkv", seconds=5).read_bytes()
    half_sent, go_on = threading.Event(), threading.Event()

    class Camera(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            half_sent.set()
            go_on.wait(20)
            self.wfile.write(data[len(data) // 2 :])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shots = pictures(f"http://user:secret@127.0.0.1:{server.server_address[1]}/clip.mkv")
        seen = [next(shots).name["frame"]]
        assert half_sent.wait(20)
        time.sleep(0.5)  # what is decoded meanwhile is left out
        go_on.set()
        with pytest.raises(DataError, match="gives no more pictures after 50") as caught:
            seen.extend(shot.name["frame"] for shot in shots)
        server.shutdown()
    assert seen == sorted(seen)
    assert seen[-1] == 49
    assert len(seen) < 45
    assert "secret" not in str(caught.value)


def test_a_camera_that_falls_silent_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.pictures.FRAME_TIMEOUT_S", 0.5)
    data, over = video(tmp_path / "clip.mkv", seconds=5).read_bytes(), threading.Event()

    class Camera(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            over.wait(20)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/clip.mkv"
        with pytest.raises(DataError, match=rf"^{url} gives no more pictures after \d+ \(nothing came for 0\.5 s\); check the camera and start again\.$"):
            list(pictures(url))
        over.set()
        server.shutdown()


def test_what_is_no_source_is_one_sentence(tmp_path, served):
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5_000))
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8_000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8_000
        container.mux(stream.encode(sound))
    for source, message in (
        (tmp_path / "noise.mp4", r"noise\.mp4 cannot be read as a video"),
        (tmp_path / "sound.wav", "holds no video"),
        (tmp_path / "nowhere.jpg", "does not exist"),
        (tmp_path / "nowhere", "does not exist"),
        ("/dev/video9", "/dev/video9 cannot be read"),
        ("", "an empty name does not exist"),
        (300 * "x", "does not exist"),
        ("/dev/shm/nowhere.jpg", "does not exist"),
        ("rtsp://user:p@secret@127.0.0.1:1/x", "rtsp://127.0.0.1:1/x cannot be read"),
        (f"{served}/nowhere.mkv", "cannot be read as a video"),
        ("rtsp://user:secret@127.0.0.1:1/x", "rtsp://127.0.0.1:1/x cannot be read"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            list(pictures(str(source)))
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_damaged_frame_is_reported_and_the_next_ones_follow(tmp_path):
    path = video(tmp_path / "clip.mkv", seconds=1)
    data = path.read_bytes()
    frames = [start for start in range(len(data)) if data[start : start + 3] == b"\xff\xd8\xff"]
    assert len(frames) == 10
    spoilt = data[: frames[3]] + bytes(frames[4] - frames[3] - 40) + data[frames[4] - 40 :]
    path.write_bytes(spoilt)
    shots = list(pictures(str(path)))
    assert [bool(shot.error) for shot in shots].count(True) == 1
    assert "damaged" in next(shot.error for shot in shots if shot.error)
    assert len(shots) == 10


def test_a_camera_that_says_nothing_is_given_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr("pipeline.runtime.pictures._frames", lambda source: (over.wait(30) and None for _ in range(1)))
    monkeypatch.setattr("pipeline.runtime.pictures.OPEN_TIMEOUT_S", 0.1)
    monkeypatch.setattr("pipeline.runtime.pictures.FRAME_TIMEOUT_S", 0.1)
    with pytest.raises(DataError, match="nothing came for"):
        next(pictures("/dev/video9"))
    over.set()


def test_whatever_breaks_a_camera_is_heard_of(monkeypatch):
    def broken(source):
        raise RuntimeError("out of cheese")
        yield

    monkeypatch.setattr("pipeline.runtime.pictures._frames", broken)
    with pytest.raises(DataError, match="out of cheese"):
        next(pictures("/dev/video9"))


def test_a_file_that_pillow_stumbles_over_is_passed_over(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6\nabc 3 255\n")
    (tmp_path / "b.jpg").write_bytes(jpeg(20))
    first, second = pictures(str(tmp_path))
    assert "a.ppm cannot be read as an image" in first.error
    assert second.picture is not None


def test_without_the_package_for_videos_one_is_told_which(tmp_path, monkeypatch):
    clip = video(tmp_path / "clip.mkv")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(CoinferError, match=r"pip install 'coinfer\[camera\]'"):
        list(pictures(str(clip)))
