"""What a device prints of the files it is given."""

import json
import socket

import pytest
from PIL import Image

from pipeline.cli import app
from pipeline.costs.link import wire_bytes
from pipeline.errors import DataError, ParamsError
from pipeline.runtime.device import PARTS, DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.records import classify
from pipeline.runtime.server import edge_process
from pipeline.runtime.transport import LoopbackTransport, TcpTransport


@pytest.fixture
def folder(tmp_path, picture):
    images = tmp_path / "images"
    (images / "night").mkdir(parents=True)
    Image.fromarray(picture.transpose(1, 2, 0)).save(images / "b.png")
    Image.new("L", (30, 20), 90).save(images / "night" / "a.jpg")
    (images / "broken.png").write_bytes(b"\x89PNG but not really")
    (images / "notes.txt").write_text("not an image")
    return images


def test_every_image_gets_a_record(make_bundle, picture, folder):
    bundle = make_bundle()
    expected = DeviceHalf(bundle).classify(picture, LoopbackTransport(EdgeHalf(bundle)))
    with edge_process(bundle) as port:
        transport = TcpTransport("127.0.0.1", port)
        records = {record["file"].rsplit("/", 1)[1]: record for record in classify(bundle, transport, str(folder))}
        transport.close()
    assert sorted(records) == ["a.jpg", "b.png", "broken.png"]
    assert "cannot be read as an image" in records["broken.png"]["error"]
    record = records["b.png"]
    assert record["label"] == bundle.classes[int(expected.logits.argmax())]
    assert 1 / 3 <= record["probability"] <= 1
    assert record["wire_bytes"] == wire_bytes(record["frame_bytes"])
    assert record["path"] == "split"
    assert {*PARTS} <= set(record)
    json.dumps(records)


def test_without_an_edge_the_device_classifies_alone_and_says_why(make_bundle, folder):
    bundle = make_bundle()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for edge in (None, TcpTransport("127.0.0.1", port)):
        [record] = classify(bundle, edge, str(folder / "b.png"))
        assert record["path"] == "device-only"
        assert record["frame_bytes"] == 0
        assert ("edge_error" in record) == (edge is not None)
    with pytest.raises(DataError, match="does not exist"):
        list(classify(bundle, None, str(folder / "nowhere")))
    (folder / "empty").mkdir()
    (folder / "empty/._b.png").write_bytes(b"what macOS leaves beside b.png")
    with pytest.raises(DataError, match="empty holds no image"):
        list(classify(bundle, None, str(folder / "empty")))


@pytest.mark.parametrize("deadline_ms", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("is_alone", [False, True])
def test_a_deadline_that_cannot_be_is_refused(make_bundle, folder, deadline_ms, is_alone):
    bundle = make_bundle()
    with pytest.raises(ParamsError, match="the deadline is"):
        list(classify(bundle, None if is_alone else LoopbackTransport(EdgeHalf(bundle)), str(folder), deadline_ms=deadline_ms))


@pytest.mark.parametrize("kept_bytes", [0, 400])
def test_where_not_one_picture_can_be_read_that_is_said_after_the_records(make_bundle, tmp_path, kept_bytes):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((30, 20), 80).save(path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    records = classify(make_bundle(), None, str(path))
    assert set(next(records)) == {"file", "error"}
    with pytest.raises(DataError, match=r"not one picture of .*cut\.jpg could be read"):
        next(records)


@pytest.mark.parametrize(
    ("options", "named"), [(["--compact"], "--compact"), (["--name", "ant"], "--name"), (["--keys", "keys", "--compact"], "--keys, --compact")]
)
def test_options_about_an_edge_are_refused_without_one(make_bundle, folder, options, named):
    with pytest.raises(ParamsError, match=f"^{named} .*give --edge"):
        app(["device", "--bundle", str(make_bundle().path), "--source", str(folder), *options], standalone_mode=False)
